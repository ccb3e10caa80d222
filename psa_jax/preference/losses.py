"""Preference losses over denoising errors: pure functions of each pair's errors, in float32.

pw, pl are the policy's mean squared errors on the chosen (winner) and the rejected (loser) image of each of b pairs,
rw, rl the reference's; see `psa_jax.preference.pair_loss` for how they come about.

Many of these losses come from language models, where they are written over the scaled log-ratio
β·log(π_θ(y)/π_ref(y)) of an answer y. For denoising, the log-ratio of an image is bounded by the log-ratios of its
noising steps; these are Gaussian, so each is a difference of squared errors (Diffusion-DPO, arXiv 2311.12908,
equation 14). With errors as means over the latent, everywhere below:

    β·log(π_θ(y)/π_ref(y))  becomes  g = (β/2)·(r − p),  and the margin of a pair is z = g_w − g_l.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from psa_jax.diffusion.predictions import prediction_of

PerPair = Float[Array, " b"]


# --- the family: each gives one loss a pair


def margin(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, beta: float) -> PerPair:
    """z = (β/2)·((pl − rl) − (pw − rw)): how much more the policy favours the winner than the reference does.

    Source: Diffusion-DPO, arXiv 2311.12908, eq. 14, with errors as means over the latent (β is larger for means).
    """
    return 0.5 * beta * ((pl - rl) - (pw - rw))


def sigmoid(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float) -> PerPair:
    """−log σ(z): ln 2 at z = 0. Source: Diffusion-DPO, arXiv 2311.12908."""
    return -jax.nn.log_sigmoid(margin(pw, pl, rw, rl, beta))


def cdpo(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float, label_smoothing: float) -> PerPair:
    """−(1 − ε)·log σ(z) − ε·log σ(−z): labels are wrong with probability ε, so z stops at log((1 − ε)/ε).

    Source: "A note on DPO with noisy preferences" (conservative DPO), Mitchell 2023; for language models.
    """
    z = margin(pw, pl, rw, rl, beta)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float, label_smoothing: float) -> PerPair:
    """[−(1 − ε)·log σ(z) + ε·log σ(−z)] / (1 − 2ε): if labels are wrong with probability ε, unbiased for the true ones.

    Unlike `cdpo` it has no lower bound: it tends to −ε·z/(1 − 2ε) for large z.

    Source: Provably robust DPO, arXiv 2403.00409; for language models.
    """
    z = margin(pw, pl, rw, rl, beta)
    smoothed = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) + label_smoothing * jax.nn.log_sigmoid(-z)
    return smoothed / (1.0 - 2.0 * label_smoothing)


def ipo(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float) -> PerPair:
    """(z − ½)²: a target margin of ½; more is as bad as less.

    The paper's (h − 1/(2τ))² over the log-ratio difference h is this over τ² with z = τ·h; so here β scales the margin
    asked for, not the loss.

    Source: IPO, arXiv 2310.12036; for language models.
    """
    return (margin(pw, pl, rw, rl, beta) - 0.5) ** 2


def hinge(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float) -> PerPair:
    """max(0, 1 − z): a pair with a margin of 1 teaches no more.

    Source: SLiC-HF, arXiv 2305.10425, with the reference's ratio as in RSO, arXiv 2309.06657; for language models.
    """
    return jax.nn.relu(1.0 - margin(pw, pl, rw, rl, beta))


def kto(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float) -> PerPair:
    """½·[(1 − σ(g_w − q)) + (1 − σ(q − g_l))]: each picture by itself, liked or disliked; ½ at the start.

    q = max(0, mean of g over all pictures of the batch) is what a picture must exceed; it has no gradient. Through q a
    pair's loss depends on the others: micro-batches have each their own q, the devices of one batch share it.

    Source: Diffusion-KTO, arXiv 2404.04465, with the sigmoid as utility, and with g's factor ½ that its published code
    leaves out, so that β is on the scale of the other losses.
    """
    winner, loser = 0.5 * beta * (rw - pw), 0.5 * beta * (rl - pl)
    least = jax.lax.stop_gradient(jax.nn.relu(0.5 * (jnp.mean(winner) + jnp.mean(loser))))
    return 0.5 * (jax.nn.sigmoid(least - winner) + jax.nn.sigmoid(loser - least))


def dmpo(pw: PerPair, pl: PerPair, rw: PerPair, rl: PerPair, *, beta: float, label_smoothing: float) -> PerPair:
    """KL(σ(z) ‖ 1 − ε) of two coins: σ(z)·log(σ(z)/(1 − ε)) + σ(−z)·log(σ(−z)/ε). 0 at z = log((1 − ε)/ε).

    The reverse of what `cdpo` minimises: it seeks the preferred mode where `cdpo` covers all. ε > 0.

    Source: Divergence Minimization Preference Optimization, arXiv 2507.07510, for a pair; ε = 0.01 in public code.
    """
    z = margin(pw, pl, rw, rl, beta)
    preferred = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-label_smoothing))
    return preferred + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(label_smoothing))


def mapo(pw: PerPair, pl: PerPair, *, beta: float, odds_scale: float) -> PerPair:
    """−log σ((β/δ)·(φ(δ·pw) − φ(δ·pl))) with φ(x) = x/(eˣ − 1): no reference; (β/2)·(pl − pw) in σ as δ → 0.

    φ is x times the odds of a picture whose likelihood is e⁻ˣ. The paper adds the winner's own error: its loss, times
    1/0.1, is this with β = T·δ = 500, δ = 0.5 and sft_weight = 1/0.1 = 10.

    Source: MaPO, arXiv 2406.06424, and its published training code (`beta_mapo` 0.1, `snr_value` δ, T = 1000).
    """

    def odds(error: PerPair) -> PerPair:
        # x·e⁻ˣ/(1 − e⁻ˣ) overflows nowhere; at x = 0 both branches must be finite, or the gradient is NaN.
        x = odds_scale * error
        safe = jnp.where(x > 0, x, 1.0)
        return jnp.where(x > 0, safe * jnp.exp(-safe) / -jnp.expm1(-safe), 1.0)

    return -jax.nn.log_sigmoid(beta / odds_scale * (odds(pw) - odds(pl)))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A preference loss and its needs.

    Attributes:
      function: (pw, pl, rw, rl), or (pw, pl) without a reference, and the parameters by name → a loss for each pair;
        None for no preference loss, where swap distillation stands alone and only winners are looked at.
      parameters: names of those attributes of `Objective` that it takes; the others do not concern it.
      reference: whether it needs the reference's errors.
      whole_batch: whether a pair's loss depends on the other pairs of the batch.
    """

    function: Callable[..., PerPair] | None
    parameters: tuple[str, ...] = ("beta",)
    reference: bool = True
    whole_batch: bool = False


LOSSES = {
    "sigmoid": Loss(sigmoid),
    "cdpo": Loss(cdpo, ("beta", "label_smoothing")),
    "robust": Loss(robust, ("beta", "label_smoothing")),
    "ipo": Loss(ipo),
    "hinge": Loss(hinge),
    "kto": Loss(kto, whole_batch=True),
    "mapo": Loss(mapo, ("beta", "odds_scale"), reference=False),
    "dmpo": Loss(dmpo, ("beta", "label_smoothing")),
    "none": Loss(None, (), reference=False),
}


# --- modifiers: what goes into a loss of the family, or is added to it


def dpop(pw: PerPair, rw: PerPair, weight: float) -> PerPair:
    """pw + λ·max(0, pw − rw), in place of pw: a winner that is worse than the reference's costs 1 + λ times as much.

    In `margin` it is the paper's z − λ·max(0, −g_w). The gradient of the maximum is 0 at pw = rw, the start.

    Source: DPO-Positive (Smaug), arXiv 2402.13228; for language models.
    """
    return pw + weight * jax.nn.relu(pw - rw)


def sdpo(pw: PerPair, pl: PerPair, cross: PerPair, mu: float) -> PerPair:
    """pl with its gradient times λ = min(1, (1 − μ)·pw/c) where c > 0, else 1; the value stays.

    c is `cross`, the mean over the latent of (ε_w − n)·(ε_l − n). A loss of the margin pushes the outputs along
    −∇pw + λ·∇pl; with this λ the push does not raise pw, to first order and as if one output moved as the other. The
    larger μ in [0, 1], the more pw must fall; at 1 the loser is not pushed at all where that would touch the winner.

    Source: Diffusion-SDPO, arXiv 2511.03317, in output space; here λ is of each pair.
    """
    pw, cross, value = jax.lax.stop_gradient((pw, cross, pl))
    opposed = cross > 0
    share = jnp.where(opposed, jnp.minimum(1.0, (1.0 - mu) * pw / jnp.where(opposed, cross, 1.0)), 1.0)
    return value + share * (pl - value)


def sft(pw: PerPair, rw: PerPair | None) -> PerPair:
    """pw − rw: keeps the winner from getting worse, which the sigmoid loss alone permits. Zero at initialisation.

    Without a reference it is pw alone: rw is a constant, so the gradient is the same.
    """
    return pw if rw is None else pw - rw


def mean_over_latent(x: Float[Array, "b h w c"]) -> PerPair:
    """Mean over everything but the batch."""
    return jnp.mean(x, axis=(1, 2, 3))


def reference_kl(policy: Float[Array, "two_b h w c"], reference: Float[Array, "two_b h w c"]) -> PerPair:
    """mean over the latent of (ε_θ − ε_ref)², averaged over a pair's two images: the policy stays near the reference.

    Up to a factor of the timestep it is KL(p_θ(x_{t−1}|x_t) ‖ p_ref(x_{t−1}|x_t)) of one denoising step.

    Args:
      policy, reference: predictions, of which a pair's two follow each other.

    Source: the KL regularisation of DPOK, arXiv 2305.16381.
    """
    distance = mean_over_latent((policy - reference) ** 2)
    return jnp.mean(distance.reshape(-1, 2), axis=-1)


# --- weights

TIMESTEP_WEIGHTS = ("none", "snr", "min_snr")


def timestep_weight(kind: str, snr: PerPair, prediction: str, gamma: float) -> PerPair:
    """ω(t) that the squared errors of a timestep are multiplied by, for what the UNet predicts.

    "none" is 1. "snr" makes them errors of ε, whatever is predicted. "min_snr" makes them errors of x_0 times
    min(SNR, γ): for an ε model min(1, γ/SNR), which takes weight from the lowest timesteps; as γ → 0 all that is left
    is the error of x_0 (times γ, so raise β). With e of the model's own output:

        error of x_0 = e_ε/SNR = e_v/(SNR + 1),  error of ε = SNR · error of x_0

    Inside σ, as Diffusion-DPO has it (arXiv 2311.12908, equation 14): it changes how far apart the errors of a
    timestep must be to count as different, not only how much a pair counts.

    Args:
      snr: ᾱ/(1 − ᾱ) at each pair's timestep.
      prediction: of `NoiseSchedule`, a key of `PREDICTIONS`.

    Source: Min-SNR, arXiv 2303.09556.
    """
    if kind == "none":
        return jnp.ones_like(snr)
    noise_error = prediction_of(prediction).noise_error(snr)
    # With zero terminal SNR the division by it must not give NaN.
    return noise_error if kind == "snr" else noise_error * jnp.minimum(1.0, gamma / jnp.maximum(snr, 1e-12))


def pair_weight(
    banned: Bool[Array, " b"], unsafe: Bool[Array, " b"], *, of_banned: float, of_allowed: float, of_safe: float
) -> PerPair:
    """The weight of each pair's loss: of an unsafe prompt that its user bans, or allows, or of a safe prompt.

    The mean of the weighted losses is not divided by the mean weight: that would make a pair's part depend on the
    others in its batch.
    """
    return jnp.where(unsafe, jnp.where(banned, of_banned, of_allowed), of_safe).astype(jnp.float32)
