"""The preference loss on a batch of pairs: inputs, predictions of policy and reference, errors, loss, metrics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from psa_jax.diffusion.conditioning import TextConditions, encode_text
from psa_jax.diffusion.predictions import prediction_of
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.models.adapter import Adapter
from psa_jax.models.attention import CrossContext
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import VAEConfig
from psa_jax.models.unet import AddedConditions, PrefixState, UNet
from psa_jax.models.vae import sample_latents
from psa_jax.preference import losses, metrics
from psa_jax.preference.batch import EMPTY_TOKENS, TOKENS, Batch
from psa_jax.preference.draws import Draws
from psa_jax.preference.losses import LOSSES, PerPair
from psa_jax.preference.objective import Objective
from psa_jax.prompt_columns import SAFE


class FrozenModel(NamedTuple):
    """The parts of a base model that a preference loss runs; none of them is trained."""

    unet: UNet
    text_encoders: tuple[CLIPText, ...]  # one, or SDXL's two; none where text states come with the batch
    schedule: NoiseSchedule
    vae: VAEConfig


class PairLosses(NamedTuple):
    """Loss and metrics of each pair.

    Attributes:
      values: `loss` (with all added terms, times the weight of the pair). Where both pictures of a pair are looked at:
        `dpo_loss` (the preference loss alone), `accuracy` (1, 0, ½ for a tie), `margin`; with the reference's errors
        `winner_gap` = pw − rw and `loser_gap` = pl − rl, both not weighted by timestep; with the reference's
        predictions `colour_drift` (`metrics.colour_drift`). With swap distillation `swap_learnt`, for a banned prompt 0
        at the start and 1 at the goal, for another 1 where nothing changes.
      parts: for each of `metrics.PARTS` and `metrics.SWAP_PARTS`, whether a pair belongs to it.
    """

    values: dict[str, PerPair]
    parts: dict[str, Bool[Array, " b"]]


def pair_losses(
    objective: Objective,
    adapter: Adapter,
    model: FrozenModel,
    batch: Batch,
    draws: Draws,
    reference_errors: Float[Array, "b 2"] | None = None,
    swap_distance: Float[Array, " parts"] | None = None,
    *,
    compare: bool = False,
) -> PairLosses:
    """Loss and metrics of each pair of a batch.

    Args:
      objective: the loss and its weights.
      adapter: the policy is the base model with it, the reference the base model without.
      model: the base model.
      batch: `chosen`, `rejected` moments [b, h, w, 2c] of any float type; `user` [b, D]; `banned` [b], whether the user
        bans the prompt's category; `unsafe` [b], whether the prompt is the unsafe one; for each text encoder
        `input_ids`, `input_ids_2` [b, s] and `empty_ids`, `empty_ids_2` [s], or in their place cached text:
        `text_states` [b, s, c] and `empty_states` [s, c], for SDXL `text_pooled` [b, p] and `empty_pooled` [p]; for
        SDXL `original_size` and `crop` [b, 2] in pixels. With swap distillation the prompt's arrays also with `safe_`
        in front, those of the pair's safe prompt, and `twin` [b], whether it is known. See `psa_jax.preference.batch`.
      draws: random inputs of these pairs.
      reference_errors: (rw, rl) for these draws (`compute_reference_errors`); the reference is then not run.
      swap_distance: mean of `swap_distances` over banned prompts, for each of `metrics.TIME_PARTS`.
      compare: look at both pictures of a pair even if the loss does not, to measure accuracy and gaps.
    """
    unet, schedule, pairs = model.unet, model.schedule, batch["user"].shape[0]
    compare = compare or objective.compares_pairs
    inputs = _noised_inputs(model, batch, draws, both=compare)
    user = jnp.where(draws.no_user, 0.0, batch["user"])
    adapted = adapter(unet, inputs.text, user, jnp.ones(pairs), inputs.contexts)
    reference = None
    if compare and reference_errors is None and (objective.needs_reference or not objective.compares_pairs):
        with jax.named_scope("reference"):
            reference = jax.lax.stop_gradient(_predict(unet, inputs, inputs.contexts))
    with jax.named_scope("policy"):
        policy = _predict(unet, _with_pooled_edit(adapter, unet, inputs, user), adapted)

    each, values = jnp.zeros(pairs), {}
    if compare:
        with jax.named_scope("objective"):
            errors = Errors.from_predictions(policy, reference, inputs.target, reference_errors)
        preference, values = _preference(objective, schedule, errors, draws)
        each = each + preference
        if reference is not None:
            slope = prediction_of(schedule.prediction).clean_slope(schedule.alphas_cumprod[draws.timesteps])
            values["colour_drift"] = metrics.colour_drift(_sides(policy)[0], _sides(reference)[0], slope)
    if objective.swap_weight:
        of_winners = _sides(policy)[0] if compare else policy
        left, values["swap_learnt"] = _swap(objective, model, batch, draws, inputs, of_winners, swap_distance)
        each = each + objective.swap_weight * left
    per_pair = losses.pair_weight(
        batch["banned"],
        batch["unsafe"],
        of_banned=objective.banned_weight,
        of_allowed=objective.allowed_weight,
        of_safe=objective.safe_weight,
    )
    parts = metrics.memberships(draws.timesteps, schedule.steps, batch["banned"], batch["unsafe"])
    return PairLosses({"loss": per_pair * each} | values, parts)


@jax.named_scope("objective")
def _preference(
    objective: Objective, schedule: NoiseSchedule, errors: "Errors", draws: Draws
) -> tuple[PerPair, dict[str, PerPair]]:
    """The preference loss of each pair with the terms that are added to it, and its metrics."""
    snr = schedule.signal_to_noise()[draws.timesteps]
    weight = losses.timestep_weight(objective.timestep_weight, snr, schedule.prediction, objective.snr_gamma)
    z = margins(objective, errors.scaled(weight))
    values = {"accuracy": metrics.wins(z), "margin": z}
    if errors.rw is not None:
        values |= {"winner_gap": errors.pw - errors.rw, "loser_gap": errors.pl - errors.rl}
    if not objective.compares_pairs:
        return jnp.zeros_like(z), values
    preference, each = compose(objective, errors.scaled(weight))
    return each, {"dpo_loss": preference} | values


def _swap(
    objective: Objective,
    model: FrozenModel,
    batch: Batch,
    draws: Draws,
    inputs: "_NoisedInputs",
    policy: Float[Array, "b h w c"],
    swap_distance: Float[Array, " parts"],
) -> tuple[PerPair, PerPair]:
    """Swap distillation of each pair: the squared error over the mean distance, and the share that is learnt.

    A banned prompt whose safe prompt is not known teaches nothing, and counts as nothing learnt.
    """
    swapped = batch["unsafe"] & batch["banned"]
    with jax.named_scope("swap_target"):
        target = _swap_target(model, batch, draws, inputs, swapped & ~draws.no_user[:, 0])
    with jax.named_scope("objective"):
        error = losses.mean_over_latent((policy - jax.lax.stop_gradient(target)) ** 2)
        known = batch["twin"] | ~swapped
        part = metrics.time_part(draws.timesteps, model.schedule.steps)
        learnt = jnp.where(known, 1.0 - error / swap_distance[part], 0.0)
        shares = _time_shares(objective)
        mean_distance = jnp.sum(shares * jnp.where(shares > 0.0, swap_distance, 0.0))
        return jnp.where(known, error / mean_distance, 0.0), learnt


def _time_shares(objective: Objective) -> Float[Array, " parts"]:
    """The share of timesteps that an objective draws from each of `metrics.TIME_PARTS`."""
    edges = jnp.linspace(0.0, 1.0, len(metrics.TIME_PARTS) + 1)
    inside = jnp.clip(edges, objective.timestep_low, objective.timestep_high)
    return (inside[1:] - inside[:-1]) / (objective.timestep_high - objective.timestep_low)


def swap_distances(model: FrozenModel, batch: Batch, draws: Draws) -> PerPair:
    """mean over the latent of (ε_ref(x, c) − ε_ref(x, c_safe))² for each pair's winner: what a swap changes at most.

    Args:
      model, batch, draws: as in `pair_losses`.
    """
    inputs = _noised_inputs(model, batch, draws, both=False)
    target = _swap_target(model, batch, draws, inputs, jnp.ones_like(batch["unsafe"]))
    return losses.mean_over_latent((_predict(model.unet, inputs, inputs.contexts) - target) ** 2)


def compute_reference_errors(model: FrozenModel, batch: Batch, draws: Draws) -> Float[Array, "b 2"]:
    """The reference's errors (rw, rl) of each pair; they do not depend on the adapter.

    Args:
      model, batch, draws: as in `pair_losses`.
    """
    inputs = _noised_inputs(model, batch, draws)
    squared = (_predict(model.unet, inputs, inputs.contexts) - inputs.target) ** 2
    return losses.mean_over_latent(squared).reshape(-1, 2)


class _NoisedInputs(NamedTuple):
    """UNet inputs that policy and reference share, but for `_with_pooled_edit`.

    Of 2b rows, those of a pair are next to each other, the winner first: a batch that is divided over devices by pairs
    is then divided by rows, too, and none is moved. Without losers, n is b.
    """

    text: Float[Array, "b s c"]
    pooled: Float[Array, "b p"] | None  # of SDXL
    contexts: tuple[CrossContext, ...]  # of the base model
    noisy: Float[Array, "n h w c"]
    timesteps: Float[Array, " n"]
    sizes: Float[Array, "n 6"] | None  # of SDXL
    prefix: PrefixState  # after the layers in front of the first cross-attention
    target: Float[Array, "n h w c"]


def _noised_inputs(model: FrozenModel, batch: Batch, draws: Draws, both: bool = True) -> _NoisedInputs:
    unet, schedule, vae = model.unet, model.schedule, model.vae
    text = _text_of(model, batch, draws.no_text)

    def repeated(x):
        return jnp.repeat(x, 2, axis=0) if both else x

    def latents(moments, sampled):
        return sample_latents(moments.astype(jnp.float32), sampled, vae.scaling_factor)

    clean = latents(batch["chosen"], draws.vae_noise_w)
    if both:
        clean = _in_turn(clean, latents(batch["rejected"], draws.vae_noise_l))
    noise, timesteps = repeated(draws.noise), repeated(draws.timesteps)
    noisy = schedule.add_noise(clean, noise, timesteps).astype(text.states.dtype)
    added = sizes = None
    if text.pooled is not None:
        pairs = text.pooled.shape[0]
        target_size = jnp.tile(vae.downscale * jnp.asarray([clean.shape[1:3]], jnp.int32), (pairs, 1))
        sizes = jnp.concatenate([batch["original_size"], batch["crop"], target_size], axis=1).astype(jnp.float32)
        sizes = repeated(sizes)
        added = AddedConditions(repeated(text.pooled), sizes)
    times = timesteps.astype(jnp.float32)
    prefix = unet.run_prefix(noisy, times, added)
    target = schedule.target(clean, noise, timesteps)
    return _NoisedInputs(text.states, text.pooled, unet.context(text.states), noisy, times, sizes, prefix, target)


def _with_pooled_edit(adapter: Adapter, unet: UNet, inputs: _NoisedInputs, user: Float[Array, "b d"]) -> _NoisedInputs:
    """The inputs of the policy. Where the adapter edits the pooled text it has a prefix of its own."""
    if not adapter.config.pooled:
        return inputs
    pooled = adapter.edit_pooled(inputs.pooled, inputs.text, user, jnp.ones(len(inputs.text)))
    sides = len(inputs.noisy) // len(inputs.text)
    added = AddedConditions(jnp.repeat(pooled, sides, axis=0), inputs.sizes)
    return inputs._replace(prefix=unet.run_prefix(inputs.noisy, inputs.timesteps, added))


def _swap_target(
    model: FrozenModel, batch: Batch, draws: Draws, inputs: _NoisedInputs, swapped: Bool[Array, " b"]
) -> Float[Array, "b h w c"]:
    """The reference's predictions for the winners, under the pair's safe prompt where `swapped`."""
    unet = model.unet
    text = _text_of(model, batch, draws.no_text, swapped)

    def of_winners(x):
        return _sides(x)[0] if len(x) > len(swapped) else x

    if text.pooled is None:
        prefix = jax.tree.map(of_winners, inputs.prefix)
    else:  # it is part of the layers in front
        added = AddedConditions(text.pooled, of_winners(inputs.sizes))
        prefix = unet.run_prefix(of_winners(inputs.noisy), of_winners(inputs.timesteps), added)
    return unet.run_suffix(prefix, unet.context(text.states)).astype(jnp.float32)


def _text_of(
    model: FrozenModel, batch: Batch, no_text: Bool[Array, "b 1"], swapped: Bool[Array, " b"] | None = None
) -> TextConditions:
    """Text states of a batch, with the empty prompt's where `no_text`; encoded here unless they are cached.

    Args:
      swapped: where the safe prompt of the pair takes the prompt's place.
    """

    def of(name: str, empty: str) -> Array:
        found = batch[name]
        if swapped is not None:
            found = jnp.where(_over(swapped, found), batch[f"{SAFE}{name}"], found)
        return jnp.where(_over(no_text[:, 0], found), batch[empty][None], found)

    if "text_states" in batch:
        dtype = model.unet.conv_in.kernel.dtype
        pooled = of("text_pooled", "empty_pooled").astype(dtype) if "text_pooled" in batch else None
        return TextConditions(of("text_states", "empty_states").astype(dtype), pooled)
    ids = tuple(of(tokens, empty) for empty, tokens, _ in zip(EMPTY_TOKENS, TOKENS, model.text_encoders, strict=False))
    return encode_text(model.text_encoders, ids)


def _over(rows: Bool[Array, " b"], array: Array) -> Bool[Array, "b ..."]:
    """One truth value a row, to be broadcast over the other axes of an array."""
    return rows.reshape(-1, *(1,) * (array.ndim - 1))


def _predict(unet: UNet, inputs: _NoisedInputs, contexts: tuple[CrossContext, ...]) -> Float[Array, "n h w c"]:
    if len(inputs.noisy) > len(inputs.text):
        contexts = jax.tree.map(_repeat, contexts)
    return unet.run_suffix(inputs.prefix, contexts).astype(jnp.float32)


class Errors(NamedTuple):
    """Errors of b pairs, from which the losses are made; None where they need a reference and none is run."""

    pw: PerPair  # mean over the latent of (prediction − target)², of the policy on the winner
    pl: PerPair
    rw: PerPair | None
    rl: PerPair | None
    cross: PerPair  # mean over the latent of (ε_w − n)·(ε_l − n), of the policy
    reference_kl: PerPair | None  # mean over the latent of (ε_θ − ε_ref)²

    @classmethod
    def from_predictions(
        cls,
        policy: Float[Array, "two_b h w c"],
        reference: Float[Array, "two_b h w c"] | None,
        target: Float[Array, "two_b h w c"],
        reference_errors: Float[Array, "b 2"] | None = None,
    ) -> "Errors":
        """Mean squared errors of float32 predictions, of which a pair's two follow each other, the winner first.

        Args:
          policy, reference: predictions; the reference's may be absent.
          target: what they should be (noise, velocity or clean latents).
          reference_errors: (rw, rl) of fixed draws, in place of the reference's predictions.
        """

        def squared(predicted):
            return _sides(losses.mean_over_latent((predicted - target) ** 2))

        winner, loser = _sides(policy - target)
        cross = losses.mean_over_latent(winner * loser)
        if reference_errors is not None:
            return cls(*squared(policy), *jnp.unstack(reference_errors, axis=-1), cross, None)
        if reference is None:
            return cls(*squared(policy), None, None, cross, None)
        return cls(*squared(policy), *squared(reference), cross, losses.reference_kl(policy, reference))

    def scaled(self, weight: PerPair) -> "Errors":
        """Each times the weight of its timestep."""
        return jax.tree.map(lambda x: weight * x, self)


def compose(objective: Objective, errors: Errors) -> tuple[PerPair, PerPair]:
    """For each pair the preference loss (with dpop and sdpo inside), and its sum with the added terms."""
    pw, pl, rw, rl, cross, reference_kl = errors
    if objective.sdpo_mu is not None:
        pl = losses.sdpo(pw, pl, cross, objective.sdpo_mu)
    if objective.dpop_weight:
        pw = losses.dpop(pw, rw, objective.dpop_weight)
    entry = LOSSES[objective.loss]
    parameters = {name: getattr(objective, name) for name in entry.parameters}
    arguments = (pw, pl, rw, rl) if entry.reference else (pw, pl)
    preference = entry.function(*arguments, **parameters)
    each = preference
    if objective.sft_weight:
        each = each + objective.sft_weight * losses.sft(errors.pw, rw)
    if objective.reference_kl_weight:
        each = each + objective.reference_kl_weight * reference_kl
    return preference, each


def margins(objective: Objective, errors: Errors) -> PerPair:
    """Margin z of each pair; without a reference z = (β/2)·(pl − pw)."""
    pw, pl, rw, rl, *_ = errors
    none = jnp.zeros_like(pw)
    return losses.margin(pw, pl, *((none, none) if rw is None else (rw, rl)), objective.beta)


@jax.named_scope("objective")
def summarise(found: PairLosses) -> dict[str, Float[Array, ""]]:
    """Metrics of a batch: means, the largest |margin|, and for each part sums and the number of pairs.

    An accuracy near 1 with a `winner_gap` above 0 is a winner that got worse.
    """
    whole = {name: jnp.mean(value) for name, value in found.values.items()}
    of_parts = {name: found.values[name] for name in metrics.OF_PARTS if name in found.values}
    summed = metrics.part_sums(of_parts, {part: found.parts[part] for part in metrics.PARTS})
    if "swap_learnt" in found.values:
        del whole["swap_learnt"]  # over prompts of all kinds it says little
        learnt = {"swap_learnt": found.values["swap_learnt"]}
        summed |= metrics.part_sums(learnt, {part: found.parts[part] for part in metrics.SWAP_PARTS})
    if "margin" in found.values:
        whole["max_abs_margin"] = jnp.max(jnp.abs(found.values["margin"]))
    return whole | summed


def _repeat(x: Array) -> Array:
    """A per-pair array for winners and losers; weights that a context carries have no row per pair and stay."""
    return jnp.repeat(x, 2, axis=0) if x.ndim == 3 else x


def _in_turn(winners: Float[Array, "b ..."], losers: Float[Array, "b ..."]) -> Float[Array, "two_b ..."]:
    """The winner and the loser of the first pair, then of the second."""
    return jnp.stack([winners, losers], axis=1).reshape(-1, *winners.shape[1:])


def _sides(rows: Float[Array, "two_b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Winners and losers of rows that `_in_turn` joined."""
    return tuple(jnp.unstack(rows.reshape(-1, 2, *rows.shape[1:]), axis=1))
