"""What a batch of pairs draws at random: anew in every step, or one of a few draws that each row has for good."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.models.vae import latent_noise
from psa_jax.preference.objective import Objective

Batch = dict[str, Shaped[Array, "..."]]

_STORED = 0x5707ED  # parts the keys of stored draws from those of steps


class Draws(NamedTuple):
    """Everything random in a step, a row for each pair; drawn for the whole batch, whatever part of it is worked on."""

    no_text: Bool[Array, "b 1"]
    no_user: Bool[Array, "b 1"]
    vae_noise_w: Float[Array, "b h w c"]
    vae_noise_l: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    timesteps: Int[Array, " b"]


def draw(objective: Objective, schedule: NoiseSchedule, batch: Batch, key: PRNGKeyArray) -> Draws:
    """What a batch needs at random: dropouts, the VAE's noise for either side, noise and timestep of each pair."""
    pairs = batch["input_ids"].shape[0]
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
class Stored:
    """A few draws that each row has for good, so that the reference's errors can be stored.

    Attributes:
      count: draws of a row, K.
      seed: of all of them.
    """

    count: int
    seed: int = 0


def draw_stored(
    stored: Stored, objective: Objective, schedule: NoiseSchedule, batch: Batch, key: PRNGKeyArray
) -> tuple[Draws, Int[Array, " b"]]:
    """For each pair of a step one of its row's draws, and that draw's number; for the rest as `draw`."""
    pairs = batch["row"].shape[0]
    drop_user, which = jax.random.split(key)
    number = spread_timesteps(which, pairs, 0.0, float(stored.count))  # so that the batch covers the timesteps evenly
    no_user = jax.random.bernoulli(drop_user, objective.user_dropout, (pairs, 1))
    return of_rows(stored, objective, schedule, batch, number)._replace(no_user=no_user), number


def of_rows(
    stored: Stored, objective: Objective, schedule: NoiseSchedule, batch: Batch, number: Int[Array, " b"]
) -> Draws:
    """The draw `number` of each row: the same whenever the row comes, whoever asks, in whatever batch.

    Nobody's user is dropped, which the reference would not see.

    Args:
      batch: with `row`, and `swapped` where the row's own rejected picture is the chosen one of this pair.
      number: draw k of K has its timestep in the k-th of K equal parts of the range.
    """
    low, high = _range(objective, schedule)
    *size, moments = batch["chosen"].shape[1:]
    latent = (*size, moments // 2)
    key = jax.random.fold_in(jax.random.key(stored.seed), _STORED)

    def of_row(row, number):
        key_here = jax.random.fold_in(jax.random.fold_in(key, row), number)
        drop_text, first, second, noise, time = jax.random.split(key_here, 5)
        share = (number.astype(jnp.float32) + jax.random.uniform(time)) / stored.count
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
