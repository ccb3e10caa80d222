"""Random inputs of a preference batch: fresh in every step, or one of K fixed draws per row."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.models.vae import latent_noise
from psa_jax.preference.batch import Batch
from psa_jax.preference.objective import Objective
from psa_jax.seeds import check_seed

_FIXED = 0x5707ED  # folded into the keys of fixed draws, so that they differ from the keys of steps


class Draws(NamedTuple):
    """Random inputs of b pairs. Drawn for the whole batch, so that `accumulate` does not change them.

    Attributes:
      no_text: where the empty prompt replaces the prompt.
      no_user: where zeros replace the user's embedding.
      vae_noise_w, vae_noise_l: standard normal noise of the VAE's sample, for winner and loser.
      noise: standard normal diffusion noise, shared by winner and loser.
      timesteps: shared by winner and loser.
    """

    no_text: Bool[Array, "b 1"]
    no_user: Bool[Array, "b 1"]
    vae_noise_w: Float[Array, "b h w c"]
    vae_noise_l: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    timesteps: Int[Array, " b"]


def draw(objective: Objective, schedule: NoiseSchedule, batch: Batch, key: PRNGKeyArray) -> Draws:
    """Fresh random inputs for every pair of a batch."""
    pairs = batch["user"].shape[0]
    drop_text, drop_user, vae_noise_w, vae_noise_l, noise_key, time_key = jax.random.split(key, 6)
    low, high = _range(objective, schedule)
    chosen, rejected = (batch[side].astype(jnp.float32) for side in ("chosen", "rejected"))
    return Draws(
        jax.random.bernoulli(drop_text, objective.text_dropout, (pairs, 1)),
        jax.random.bernoulli(drop_user, objective.user_dropout, (pairs, 1)),
        latent_noise(vae_noise_w, chosen),
        latent_noise(vae_noise_l, rejected),
        latent_noise(noise_key, chosen),
        spread_timesteps(time_key, pairs, low, high),
    )


@dataclasses.dataclass(frozen=True)
class FixedDraws:
    """K draws that each row keeps through training, so that the reference's errors can be computed once.

    Attributes:
      count: draws of a row, K.
      seed: of all of them.
    """

    count: int
    seed: int = 0


def fixed_draws_or_none(count: int, seed: int, objective: Objective, *, flips: bool) -> FixedDraws | None:
    """The fixed draws of a configuration (`reference.draws`, `reference.seed`); None where `count` is 0.

    Args:
      flips: whether the shards hold mirrored pictures.

    Raises:
      PSAError: an objective or shards for which stored errors do not suffice.
    """
    if count == 0:
        return None
    if count < 0:
        raise PSAError(f"reference.draws is {count}; give a number of draws for each pair, or 0 to store nothing")
    if not objective.needs_reference:
        raise PSAError(f"reference.draws is {count}, but {objective.loss} runs no reference; set it to 0")
    if objective.reference_kl_weight > 0.0:
        raise PSAError(
            f"reference.draws is {count}, but objective.reference_kl_weight compares predictions, and only errors "
            "are stored; set one of the two to 0"
        )
    if flips:
        raise PSAError(
            f"reference.draws is {count}, but these shards hold mirrored pictures, too; build shards without --flips"
        )
    return FixedDraws(count, check_seed(seed, "reference.seed"))


def draw_fixed(
    fixed_draws: FixedDraws, objective: Objective, schedule: NoiseSchedule, batch: Batch, key: PRNGKeyArray
) -> tuple[Draws, Int[Array, " b"]]:
    """For each pair one of its row's fixed draws, and the number of that draw; user dropout is fresh."""
    pairs = batch["row"].shape[0]
    drop_user, which = jax.random.split(key)
    # Spread, so that the batch covers the timesteps evenly.
    number = spread_timesteps(which, pairs, 0.0, float(fixed_draws.count))
    no_user = jax.random.bernoulli(drop_user, objective.user_dropout, (pairs, 1))
    return draws_of_rows(fixed_draws, objective, schedule, batch, number)._replace(no_user=no_user), number


def draws_of_rows(
    fixed_draws: FixedDraws, objective: Objective, schedule: NoiseSchedule, batch: Batch, number: Int[Array, " b"]
) -> Draws:
    """The fixed draw `number` of each row: a function of seed, row and number alone.

    There is no user dropout here: the reference does not depend on the user.

    Args:
      batch: with `row`, and `swapped` where the row's own rejected picture is the chosen one of this pair.
      number: draw k of K has its timestep in the k-th of K equal parts of the range.
    """
    low, high = _range(objective, schedule)
    *size, moments = batch["chosen"].shape[1:]
    latent = (*size, moments // 2)
    key = jax.random.fold_in(jax.random.key(fixed_draws.seed), _FIXED)

    def of_row(row, number):
        key_here = jax.random.fold_in(jax.random.fold_in(key, row), number)
        drop_text, first, second, noise, time = jax.random.split(key_here, 5)
        share = (number.astype(jnp.float32) + jax.random.uniform(time)) / fixed_draws.count
        return (
            jax.random.bernoulli(drop_text, objective.text_dropout, (1,)),
            *(jax.random.normal(each, latent) for each in (first, second, noise)),
            _timestep(low, high, share),
        )

    no_text, own_chosen, own_rejected, noise, timesteps = jax.vmap(of_row)(batch["row"], number)
    swapped = batch["swapped"][:, None, None, None]
    return Draws(
        no_text,
        jnp.zeros_like(no_text),
        jnp.where(swapped, own_rejected, own_chosen),  # a picture keeps its noise, whichever side it is on
        jnp.where(swapped, own_chosen, own_rejected),
        noise,
        timesteps,
    )


def spread_timesteps(key: PRNGKeyArray, count: int, low: float, high: float) -> Int[Array, " n"]:
    """One timestep from each of `count` equal parts of [low, high), in random order.

    Each is uniform by itself, as an independent draw is; together they cover the range, and the gradient varies less
    from batch to batch. Source: Variational Diffusion Models, arXiv 2107.00630, appendix I.1.
    """
    order_key, offset_key = jax.random.split(key)
    part = jax.random.permutation(order_key, jnp.arange(count, dtype=jnp.float32)) + jax.random.uniform(
        offset_key, count
    )
    return _timestep(low, high, part / count)


def _range(objective: Objective, schedule: NoiseSchedule) -> tuple[float, float]:
    return objective.timestep_low * schedule.steps, objective.timestep_high * schedule.steps


def _timestep(low: float, high: float, share: Float[Array, "*b"]) -> Int[Array, "*b"]:
    return jnp.clip(jnp.floor(low + (high - low) * share), low, high - 1).astype(jnp.int32)
