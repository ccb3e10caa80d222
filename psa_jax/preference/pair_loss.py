"""Preference learning on a batch of pairs: policy, reference, errors, loss, and what to log about them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from psa_jax.diffusion.conditioning import encode_text
from psa_jax.diffusion.predictions import prediction_of
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.models.adapter import Adapter
from psa_jax.models.attention import CrossContext
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import VAEConfig
from psa_jax.models.unet import AddedConditions, PrefixState, UNet
from psa_jax.models.vae import sample_latents
from psa_jax.preference import losses, metrics
from psa_jax.preference.draws import Batch, Draws
from psa_jax.preference.losses import LOSSES, PerPair
from psa_jax.preference.objective import Objective

_TOKENS = ("input_ids", "input_ids_2")
_EMPTY = ("empty_ids", "empty_ids_2")


def batch_arrays(text_encoders: int, stored: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the arrays of a batch: those with a row for each pair, and those without.

    Args:
      stored: whether draws are stored.
    """
    sizes = () if text_encoders == 1 else ("original_size", "crop")
    of_rows = ("row", "swapped") if stored else ()
    of_pairs = ("chosen", "rejected", "user", "banned", "unsafe", *_TOKENS[:text_encoders], *sizes, *of_rows)
    return of_pairs, _EMPTY[:text_encoders]


class Base(NamedTuple):
    """The base model, as far as pairs are asked of it; nothing of it is trained."""

    unet: UNet
    text_encoders: tuple[CLIPText, ...]  # one, or SDXL's two
    schedule: NoiseSchedule
    vae: VAEConfig


class PairLosses(NamedTuple):
    """What a step finds out about each of its pairs.

    Attributes:
      values: `loss` (with everything that is added to it, times the weight of the pair), `dpo_loss` (the chosen loss
        alone), `accuracy` (1, 0, ½ for a tie), `margin`; with the reference's errors `winner_gap` = pw − rw,
        `loser_gap` = pl − rl, both not weighted by timestep; with its predictions `colour_drift`
        (`metrics.colour_drift`).
      parts: which pairs belong to each of `metrics.PARTS`.
    """

    values: dict[str, PerPair]
    parts: dict[str, Bool[Array, " b"]]


def pair_losses(
    objective: Objective,
    adapter: Adapter,
    base: Base,
    batch: Batch,
    draws: Draws,
    stored: Float[Array, "b 2"] | None = None,
) -> PairLosses:
    """The loss of each pair and what else is known about it.

    Args:
      batch: `chosen`, `rejected` moments [b, h, w, 2c] of any float type; `user` [b, D]; `banned` [b], whether the user
        bans the prompt's category; `unsafe` [b], whether the prompt is the unsafe one; for each text encoder
        `input_ids`, `input_ids_2` [b, s] and `empty_ids`, `empty_ids_2` [s]; for SDXL `original_size` and
        `crop` [b, 2] in pixels.
      draws: of these pairs.
      stored: (rw, rl) if `reference_errors` has found them for these draws; the reference is then not run.
    """
    unet, schedule = base.unet, base.schedule
    pairs = batch["input_ids"].shape[0]
    inputs = _noised(base, batch, draws)
    user = jnp.where(draws.no_user, 0.0, batch["user"])
    adapted = adapter(unet, inputs.text, user, jnp.ones(pairs), inputs.base)
    run = objective.needs_reference and stored is None
    reference = jax.lax.stop_gradient(_predict(unet, inputs, inputs.base)) if run else None
    policy = _predict(unet, inputs, adapted)

    unsafe = batch["unsafe"]
    errors = Errors.of(policy, reference, inputs.target, stored)
    snr = schedule.signal_to_noise()[draws.timesteps]
    weight = losses.timestep_weight(objective.timestep_weight, snr, schedule.prediction, objective.snr_gamma)
    family, each = compose(objective, errors.scaled(weight))
    per_pair = losses.pair_weight(
        batch["banned"],
        unsafe,
        of_banned=objective.banned_weight,
        of_allowed=objective.allowed_weight,
        of_safe=objective.safe_weight,
    )
    z = margins(objective, errors.scaled(weight))
    values = {"loss": per_pair * each, "dpo_loss": family, "accuracy": metrics.wins(z), "margin": z}
    if errors.rw is not None:
        values |= {"winner_gap": errors.pw - errors.rw, "loser_gap": errors.pl - errors.rl}
    if reference is not None:
        slope = prediction_of(schedule.prediction).clean_slope(schedule.alphas_cumprod[draws.timesteps])
        values["colour_drift"] = metrics.colour_drift(policy[:pairs], reference[:pairs], slope)
    return PairLosses(values, metrics.memberships(draws.timesteps, schedule.steps, batch["banned"], unsafe))


def reference_errors(base: Base, batch: Batch, draws: Draws) -> Float[Array, "b 2"]:
    """(rw, rl) of each pair, which no adapter changes: see `pair_losses`."""
    inputs = _noised(base, batch, draws)
    errors = losses.mean_over_latent((_predict(base.unet, inputs, inputs.base) - inputs.target) ** 2)
    return jnp.stack(jnp.split(errors, 2), axis=-1)


class _Noised(NamedTuple):
    """What policy and reference are asked, winners before losers, as far as neither differs from the other."""

    text: Float[Array, "b s c"]
    base: tuple[CrossContext, ...]
    prefix: PrefixState  # the layers that no user reaches
    target: Float[Array, "two_b h w c"]


def _noised(base: Base, batch: Batch, draws: Draws) -> _Noised:
    unet, text_encoders, schedule, vae = base
    pairs = batch["input_ids"].shape[0]
    ids = tuple(
        jnp.where(draws.no_text, batch[empty][None, :], batch[tokens])
        for empty, tokens, _ in zip(_EMPTY, _TOKENS, text_encoders, strict=False)
    )
    text = encode_text(text_encoders, ids)

    def twice(x):
        return jnp.concatenate([x, x])

    sides = ((batch["chosen"], draws.vae_noise_w), (batch["rejected"], draws.vae_noise_l))
    clean = jnp.concatenate(
        [sample_latents(moments.astype(jnp.float32), sampled, vae.scaling_factor) for moments, sampled in sides]
    )
    noise, timesteps = twice(draws.noise), twice(draws.timesteps)
    noisy = schedule.add_noise(clean, noise, timesteps)
    added = None
    if text.pooled is not None:
        target_size = jnp.tile(vae.downscale * jnp.asarray([clean.shape[1:3]], jnp.int32), (pairs, 1))
        sizes = jnp.concatenate([batch["original_size"], batch["crop"], target_size], axis=1).astype(jnp.float32)
        added = AddedConditions(twice(text.pooled), twice(sizes))
    prefix = unet.run_prefix(noisy.astype(text.states.dtype), timesteps.astype(jnp.float32), added)
    return _Noised(text.states, unet.context(text.states), prefix, schedule.target(clean, noise, timesteps))


def _predict(unet: UNet, inputs: _Noised, contexts: tuple[CrossContext, ...]) -> Float[Array, "two_b h w c"]:
    pairs = len(inputs.text)
    return unet.run_suffix(inputs.prefix, jax.tree.map(lambda x: _repeat(x, pairs), contexts)).astype(jnp.float32)


class Errors(NamedTuple):
    """What the losses see of the predictions for b pairs; None where that takes a reference and none is run."""

    pw: PerPair  # mean over the latent of (prediction − target)², of the policy on the winner
    pl: PerPair
    rw: PerPair | None
    rl: PerPair | None
    cross: PerPair  # mean over the latent of (ε_w − n)·(ε_l − n), of the policy
    reference_kl: PerPair | None  # mean over the latent of (ε_θ − ε_ref)²

    @classmethod
    def of(
        cls,
        policy: Float[Array, "two_b h w c"],
        reference: Float[Array, "two_b h w c"] | None,
        target: Float[Array, "two_b h w c"],
        stored: Float[Array, "b 2"] | None = None,
    ) -> "Errors":
        """From predictions for the winners and then the losers, in float32; `stored` as in `pair_losses`."""

        def squared(predicted):
            return jnp.split(losses.mean_over_latent((predicted - target) ** 2), 2)

        winner, loser = jnp.split(policy - target, 2)
        cross = losses.mean_over_latent(winner * loser)
        if stored is not None:
            return cls(*squared(policy), *jnp.unstack(stored, axis=-1), cross, None)
        if reference is None:
            return cls(*squared(policy), None, None, cross, None)
        return cls(*squared(policy), *squared(reference), cross, losses.reference_kl(policy, reference))

    def scaled(self, weight: PerPair) -> "Errors":
        """Each times the weight of its timestep."""
        return jax.tree.map(lambda x: weight * x, self)


def compose(objective: Objective, errors: Errors) -> tuple[PerPair, PerPair]:
    """For each pair: the loss of the family (with dpop and sdpo inside), and that with what is added to it."""
    pw, pl, rw, rl, cross, reference_kl = errors
    if objective.sdpo_mu is not None:
        pl = losses.sdpo(pw, pl, cross, objective.sdpo_mu)
    if objective.dpop_weight:
        pw = losses.dpop(pw, rw, objective.dpop_weight)
    entry = LOSSES[objective.loss]
    parameters = {name: getattr(objective, name) for name in entry.parameters}
    family = entry.function(pw, pl, rw, rl, **parameters) if entry.reference else entry.function(pw, pl, **parameters)
    each = family
    if objective.sft_weight:
        each = each + objective.sft_weight * losses.sft(errors.pw, rw)
    if objective.reference_kl_weight:
        each = each + objective.reference_kl_weight * reference_kl
    return family, each


def margins(objective: Objective, errors: Errors) -> PerPair:
    """z of each pair; without a reference z = (β/2)·(pl − pw)."""
    pw, pl, rw, rl, *_ = errors
    none = jnp.zeros_like(pw)
    return losses.margin(pw, pl, *((none, none) if rw is None else (rw, rl)), objective.beta)


def summarise(found: PairLosses) -> dict[str, Float[Array, ""]]:
    """Is it learning? Means over a batch, the largest |margin|, and for each part sums and a number of pairs.

    An accuracy near 1 with a `winner_gap` above 0 is a winner that got worse.
    """
    whole = {name: jnp.mean(value) for name, value in found.values.items()}
    of_parts = {name: found.values[name] for name in metrics.OF_PARTS if name in found.values}
    largest = {"max_abs_margin": jnp.max(jnp.abs(found.values["margin"]))}
    return whole | largest | metrics.part_sums(of_parts, found.parts)


def _repeat(x: Array, pairs: int) -> Array:
    """Per-pair context for winner and loser; weights that a context carries are not per pair and stay."""
    return jnp.concatenate([x, x]) if x.ndim == 3 else x
