"""The objective of preference learning: the loss, its parameters, and the meaning of β."""

import dataclasses
import math

from psa_jax.errors import PSAError
from psa_jax.preference.losses import LOSSES, TIMESTEP_WEIGHTS
from psa_jax.renamed import accepts_old_fields
from psa_jax.rules import quoted


@accepts_old_fields("objective")
@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss: mean over pairs of weight · (loss + sft_weight·(pw − rw) + reference_kl_weight·‖ε_θ − ε_ref‖²
    + swap_weight·‖ε_θ(x, c, u) − ε_ref(x, c*)‖²/d).

    The last term is swap distillation, on winners: c* is the safe prompt of the pair where the prompt is unsafe and the
    user bans it, else the prompt itself, and d is the mean of ‖ε_ref(x, c) − ε_ref(x, c*)‖² over banned prompts, so
    that the term is near 1 a banned pair at the start and 0 at the goal. Source: the model-based variant of Concept
    Ablation, arXiv 2303.13516, for each user.

    β and the mean. The errors pw, pl, rw, rl, and ‖·‖², are means over the h·w·c numbers of a latent, and β belongs to
    that: on sums it would be β/(h·w·c). The paper's 5000 is 0.31 on sums of 64 × 64 × 4, and at twice the resolution it
    weighs each number of the latent a quarter as much. See `effective_beta` and `describe_beta`.

    Attributes:
      beta: β of the margin z = (β/2)·((pl − rl) − (pw − rw)), for errors that are means over the latent.
      sft_weight: weight of pw − rw, which keeps the winner from getting worse; about 0.1·β. Of pw alone where the loss
        needs no reference, which has the same gradient.
      text_dropout: share of pairs whose prompt is replaced by the empty one.
      user_dropout: share of pairs whose user embedding is replaced by zeros (the `zeros` unconditional branch).
      timestep_low, timestep_high: the part of the schedule that timesteps are drawn from, evenly, as shares of T.
        Where a prompt changes the prediction most, a pair teaches most.
      loss: one of `losses.LOSSES`.
      label_smoothing: ε of cdpo, robust and dmpo, the share of wrong labels; the other losses have none.
      odds_scale: δ of mapo.
      dpop_weight: λ of dpop: a winner worse than the reference's costs 1 + λ times as much inside the loss.
      sdpo_mu: μ of sdpo, in [0, 1]: the loser's gradient is cut where it would raise the winner's error; None: off.
      reference_kl_weight: weight of the mean squared distance between the policy's and the reference's predictions.
      swap_weight: weight of swap distillation; 0 leaves it out.
      timestep_weight: one of `losses.TIMESTEP_WEIGHTS`: what all of these errors but the swap's are multiplied by at a
        timestep.
      snr_gamma: γ of min_snr.
      banned_weight, allowed_weight, safe_weight: weights of the pairs of unsafe prompts that the user bans and allows,
        and of safe prompts.
    """

    beta: float = 5000.0
    sft_weight: float = 500.0
    text_dropout: float = 0.0
    user_dropout: float = 0.0
    timestep_low: float = 0.0
    timestep_high: float = 1.0
    loss: str = "sigmoid"
    label_smoothing: float = 0.1
    odds_scale: float = 0.5
    dpop_weight: float = 0.0
    sdpo_mu: float | None = None
    reference_kl_weight: float = 0.0
    swap_weight: float = 0.0
    timestep_weight: str = "none"
    snr_gamma: float = 5.0
    banned_weight: float = 1.0
    allowed_weight: float = 1.0
    safe_weight: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.timestep_low < self.timestep_high <= 1.0:
            raise PSAError(
                f"objective: timesteps from {self.timestep_low} to {self.timestep_high}; "
                "give shares of the schedule with 0 <= timestep_low < timestep_high <= 1"
            )
        for name, choices in (("loss", LOSSES), ("timestep_weight", TIMESTEP_WEIGHTS)):
            if getattr(self, name) not in choices:
                raise PSAError(f"objective.{name} is {quoted(getattr(self, name))}; choose {', '.join(choices)}")
        for name in ("beta", "odds_scale", "snr_gamma"):
            self._require(name, "a positive number", 0.0 < getattr(self, name) < math.inf)
        for name in ("sft_weight", "dpop_weight", "reference_kl_weight", "swap_weight"):
            self._require(name, "0 or a positive number", 0.0 <= getattr(self, name) < math.inf)
        for name in ("text_dropout", "user_dropout"):
            self._require(name, "a share from 0 to 1", 0.0 <= getattr(self, name) <= 1.0)
        self._require("label_smoothing", "0 or more and less than 0.5", 0.0 <= self.label_smoothing < 0.5)
        if self.loss == "dmpo":
            self._require("label_smoothing", "more than 0 for dmpo, such as 0.01", self.label_smoothing > 0.0)
        if self.sdpo_mu is not None:
            self._require("sdpo_mu", "0 to 1, or None to do without", 0.0 <= self.sdpo_mu <= 1.0)
        for name in ("banned_weight", "allowed_weight", "safe_weight"):
            self._require(name, "0 or a positive number", 0.0 <= getattr(self, name) < math.inf)
        if self.banned_weight == self.allowed_weight == self.safe_weight == 0.0:
            raise PSAError(
                "objective: banned_weight, allowed_weight and safe_weight are all 0; give one of them a weight"
            )

        if LOSSES[self.loss].function is None:
            if self.swap_weight == 0.0:
                raise PSAError("objective.loss is none, which needs swap distillation; give objective.swap_weight")
            for name in ("sft_weight", "dpop_weight", "reference_kl_weight"):
                self._require(name, "0 where objective.loss is none", getattr(self, name) == 0.0)

    def _require(self, name: str, what: str, holds: bool) -> None:
        if not holds:
            raise PSAError(f"objective.{name} is {getattr(self, name)}; give {what}")

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss looks at the rejected picture of a pair, too."""
        return LOSSES[self.loss].function is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is needed, by the loss or by a term that is added to it."""
        return LOSSES[self.loss].reference or self.dpop_weight > 0.0 or self.reference_kl_weight > 0.0


def effective_beta(beta: float, latent: tuple[int, int, int]) -> float:
    """β/(h·w·c): what β would be for errors that are sums over the latent, not means.

    Sums are what the log-ratio of the Gaussians has (`psa_jax.preference.losses`): this is the number to compare with a
    paper that sums, and between resolutions.
    """
    return beta / math.prod(latent)


def describe_beta(beta: float, latent: tuple[int, int, int]) -> str:
    """Log line: β for mean and for summed errors, and the error difference at which the margin is 1."""
    height, width, channels = latent
    return (
        f"β = {beta:g} on errors that are means over {height}×{width}×{channels} latents "
        f"(effective β = {effective_beta(beta, latent):.4g} on sums); "
        f"the margin is 1 where the errors' differences are {2.0 / beta:.3g} apart"
    )
