"""Samplers as tables: one row a model call, one pure `step` for all of them, the loop in one `lax.scan`.

Every sampler here is linear in the latents, the model's outputs and the noise. They differ only in their
weights, which `psa_jax.diffusion.sampler_tables` computes before tracing: one compiled program serves all samplers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from psa_jax.errors import PSAError


class Row(NamedTuple):
    """The weights of one model call; in `Sampler.rows` each has a leading axis of n calls."""

    timestep: Float[Array, "*n"]
    input_scale: Float[Array, "*n"]
    keep_latents: Float[Array, "*n"]
    keep_output: Float[Array, "*n"]
    latents: Float[Array, "*n"]
    output: Float[Array, "*n"]
    history: Float[Array, "*n kept"]
    noise: Float[Array, "*n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to get from noise x_0 to a picture x_n, with outputs o_k of the model and standard normal noise ε_k:

        o_k = model(input_scale_k·x_k, timestep_k)
        m_k = keep_latents_k·x_k + keep_output_k·o_k                          in ±clip where that is set
        x_{k+1} = latents_k·x_k + output_k·o_k + Σ_j history_{k,j}·m_{k−j} + noise_k·ε_k

    `init_scale` is the standard deviation of x_0. A pytree: give it to jitted functions as an argument.
    """

    rows: Row
    init_scale: Float[Array, ""] | Float[np.ndarray, ""]
    clip: float | None = dataclasses.field(default=None, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def timesteps(self) -> Float[Array, " n"] | Float[np.ndarray, " n"]:
        """What the model is told, call by call; may have fractions."""
        return self.rows.timestep

    @property
    def calls(self) -> int:
        """Number of model calls n (PNDM needs one more than its steps)."""
        return self.rows.timestep.shape[0]


class State(NamedTuple):
    """What a sampler carries from call to call: x_k, the m_{k−1}, m_{k−2}, … still needed, and k."""

    latents: Float[Array, "b h w c"]
    history: Float[Array, "kept b h w c"]
    index: Int[Array, ""]


def _row(sampler: Sampler, index: Int[Array, ""]) -> Row:
    return jax.tree.map(lambda weights: jnp.asarray(weights)[index], sampler.rows)


def start(sampler: Sampler, noise: Float[Array, "b h w c"]) -> State:
    """The state before the first call, from standard normal noise."""
    latents = noise.astype(jnp.float32) * sampler.init_scale
    kept = sampler.rows.history.shape[-1] - 1
    return State(latents, jnp.zeros((kept, *latents.shape), jnp.float32), jnp.int32(0))


def model_input(sampler: Sampler, state: State) -> tuple[Float[Array, "b h w c"], Float[Array, ""]]:
    """What the model is called with: the scaled latents and the timestep."""
    row = _row(sampler, state.index)
    return state.latents * row.input_scale, row.timestep


def step(
    sampler: Sampler, state: State, output: Float[Array, "b h w c"], noise: Float[Array, "b h w c"] | None = None
) -> State:
    """One step from the model's output (guidance included) and, for a stochastic sampler, standard normal noise."""
    if noise is None and sampler.stochastic:
        raise PSAError("this sampler is stochastic: give noise to its steps")
    row, output = _row(sampler, state.index), output.astype(jnp.float32)
    kept = row.keep_latents * state.latents + row.keep_output * output
    if sampler.clip is not None:
        kept = kept.clip(-sampler.clip, sampler.clip)
    history = jnp.concatenate([kept[None], state.history])
    latents = row.latents * state.latents + row.output * output
    # Elementwise: a dot product would lose digits on accelerators.
    for lag in range(history.shape[0]):
        latents += row.history[lag] * history[lag]
    if sampler.stochastic:
        latents += row.noise * noise
    return State(latents, history[:-1], state.index + 1)


def step_noise(keys: Key[Array, " b"], index: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Standard normal noise of step `index`, a key a picture: a picture does not depend on its batch."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def sample(
    sampler: Sampler,
    model: Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]],
    noise: Float[Array, "b h w c"],
    keys: Key[Array, " b"] | None = None,
) -> Float[Array, "b h w c"]:
    """From standard normal noise to clean latents.

    Args:
      model: (scaled latents, timestep) -> prediction, guidance included.
      noise: standard normal; scaled to the sampler's first noise level here.
      keys: one a picture, needed by a stochastic sampler. The key that drew `noise` itself will do.
    """
    if keys is None and sampler.stochastic:
        raise PSAError("this sampler is stochastic: give one key a picture")

    def call(state: State, _: None) -> tuple[State, None]:
        output = model(*model_input(sampler, state))
        fresh = step_noise(keys, state.index, noise.shape[1:]) if sampler.stochastic else None
        return step(sampler, state, output, fresh), None

    return jax.lax.scan(call, start(sampler, noise), None, length=sampler.calls)[0].latents


def guide(
    without: Float[Array, "b h w c"],
    with_prompt: Float[Array, "b h w c"],
    guidance: float | Float[Array, ""],
    rescale: float | Float[Array, ""] = 0.0,
) -> Float[Array, "b h w c"]:
    """Classifier-free guidance g = ε_∅ + w·(ε − ε_∅), rescaled: φ·g·std(ε)/std(g) + (1 − φ)·g.

    Args:
      guidance: w; 1 is the prompt alone.
      rescale: φ from 0 (left as it is) to 1 (each picture's output has the standard deviation of the prompt's alone).

    Source: arXiv 2305.08891, section 3.4.
    """
    guided = without + guidance * (with_prompt - without)
    axes = (1, 2, 3)
    ratio = with_prompt.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return guided * (rescale * ratio + (1.0 - rescale))
