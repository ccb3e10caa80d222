"""What a batch of pairs says about learning: means over all pairs, and sums over parts of them.

A part (a stretch of the schedule, or the pairs whose prompt is banned) may be empty in one batch, so for each there are
sums and a number of pairs. These add up over steps, batches and processes; `part_means` divides at the end.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from psa_jax.preference.losses import PerPair

TIME_PARTS = ("t0", "t1", "t2", "t3")
"""Equal parts of the whole schedule, from the least noise to the most."""
PROMPT_PARTS = ("banned", "allowed", "safe")
"""Unsafe prompts whose category the user bans, those whose category the user allows, and safe prompts."""
PARTS = TIME_PARTS + PROMPT_PARTS
OF_PARTS = ("accuracy", "margin", "winner_gap", "loser_gap")
"""What is summed over each part."""
SWAP_PARTS = PROMPT_PARTS + tuple(f"banned{number}" for number in range(len(TIME_PARTS)))
"""What `swap_learnt` is summed over: prompts by kind, and those that are banned by part of the schedule, too."""

_SUM, _PAIRS = "sum_", "pairs_"


def wins(z: PerPair) -> PerPair:
    """1 where z > 0, 0 where z < 0, ½ for a tie."""
    return jnp.where(z > 0, 1.0, jnp.where(z < 0, 0.0, 0.5))


def memberships(
    timesteps: Int[Array, " b"], steps: int, banned: Bool[Array, " b"], unsafe: Bool[Array, " b"]
) -> dict[str, Bool[Array, " b"]]:
    """For each of PARTS and SWAP_PARTS, whether a pair belongs to it; T is `steps`."""
    part = time_part(timesteps, steps)
    of_time = {name: part == i for i, name in enumerate(TIME_PARTS)}
    of_prompt = {"banned": unsafe & banned, "allowed": unsafe & ~banned, "safe": ~unsafe}
    return of_time | of_prompt | {f"banned{i}": unsafe & banned & (part == i) for i in range(len(TIME_PARTS))}


def time_part(timesteps: Int[Array, " b"], steps: int) -> Int[Array, " b"]:
    """The number of the part of the schedule, of TIME_PARTS, that each timestep lies in; T is `steps`."""
    return timesteps * len(TIME_PARTS) // steps


def part_sums(values: Mapping[str, PerPair], parts: Mapping[str, Bool[Array, " b"]]) -> dict[str, Float[Array, ""]]:
    """`sum_VALUE_PART` for each value and part, and `pairs_PART`, the number of pairs."""
    members = jnp.stack(list(parts.values()))  # [part, b]
    every = jnp.stack([jnp.ones(members.shape[1]), *values.values()])  # [value, b]
    # One reduction, and so one message between devices, for all of them.
    sums = jnp.sum(jnp.where(members[None], every[:, None], 0.0), axis=-1)
    names = [[f"{_PAIRS}{part}" for part in parts], *([f"{_SUM}{value}_{part}" for part in parts] for value in values)]
    return {name: sums[i, j] for i, row in enumerate(names) for j, name in enumerate(row)}


def part_means(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics with `VALUE_PART`, the mean, in place of `sum_VALUE_PART`; nothing for a part without pairs.

    `pairs_PART` stays, so that means of rows can be weighted. On the host: give it the sum, or the mean, of the rows of
    any number of steps.
    """
    means = {}
    for name, value in row.items():
        if name.startswith(_SUM):
            pairs = row[_PAIRS + name.rsplit("_", 1)[1]]
            if pairs:
                means[name.removeprefix(_SUM)] = value / pairs
        else:
            means[name] = value
    return means


def colour_drift(policy: Float[Array, "b h w c"], reference: Float[Array, "b h w c"], to_clean: PerPair) -> PerPair:
    """Mean over channels of |channel mean of x̂_0 by the policy − that by the reference|.

    A latent's channel means are its picture's overall colour and brightness: they drift when preference is learnt by
    a tint. x̂_0 is linear in the prediction, so the noisy latent cancels and the slope ∂x̂_0/∂prediction is enough.

    Args:
      policy, reference: predictions for the winners.
      to_clean: that slope at each pair's timestep; see `Prediction.clean_slope`.
    """
    difference = jnp.mean(policy - reference, axis=(1, 2))  # [b, c]
    return jnp.mean(jnp.abs(to_clean[:, None] * difference), axis=-1)
