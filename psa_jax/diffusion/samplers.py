"""Engine of the samplers: a table with one row a model call, one pure `step` for all, the loop in one `lax.scan`.

Every sampler here is linear in the latents, the model's outputs and the noise. They differ only in their
weights, which `psa_jax.diffusion.sampler_tables` computes before tracing: one compiled program serves all samplers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from psa_jax.errors import PSAError

Memory = PyTree[Array] | None
"""What a model hands from one call to the next."""


class Row(NamedTuple):
    """Weights of one model call, as `Sampler` defines them; in `Sampler.rows` each has a leading axis of n calls."""

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
    """A sampler as a table: the way from noise x_0 to clean latents x_n.

    With outputs o_k of the model and standard normal noise ε_k:

        o_k = model(input_scale_k·x_k, timestep_k)
        m_k = keep_latents_k·x_k + keep_output_k·o_k                          in ±clip where that is set
        x_{k+1} = latents_k·x_k + output_k·o_k + Σ_j history_{k,j}·m_{k−j} + noise_k·ε_k

    A pytree, passed to jitted functions as an argument.

    Attributes:
      rows: weights of the n calls.
      init_scale: standard deviation of x_0.
      clip: bound of |m_k|; None for no bound.
      stochastic: whether some noise_k is not zero.
    """

    rows: Row
    init_scale: Any  # a float32 scalar; JAX also puts what describes an array in its place, to lower a program
    clip: float | None = dataclasses.field(default=None, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def timesteps(self) -> Float[Array, " n"] | Float[np.ndarray, " n"]:
        """Timesteps of the model calls, possibly with fractions."""
        return self.rows.timestep

    @property
    def calls(self) -> int:
        """Number of model calls n. PNDM makes more of them than its steps."""
        return self.rows.timestep.shape[0]


class State(NamedTuple):
    """State of a sampler before call k.

    Attributes:
      latents: x_k.
      history: m_{k−1}, m_{k−2}, …, as many as the sampler needs.
      index: k.
    """

    latents: Float[Array, "b h w c"]
    history: Float[Array, "kept b h w c"]
    index: Int[Array, ""]


def _row(sampler: Sampler, index: Int[Array, ""]) -> Row:
    return jax.tree.map(lambda weights: jnp.asarray(weights)[index], sampler.rows)


def start(sampler: Sampler, noise: Float[Array, "b h w c"]) -> State:
    """State before the first call.

    Args:
      noise: standard normal.
    """
    latents = noise.astype(jnp.float32) * sampler.init_scale
    kept = sampler.rows.history.shape[-1] - 1
    return State(latents, jnp.zeros((kept, *latents.shape), jnp.float32), jnp.int32(0))


def model_input(sampler: Sampler, state: State) -> tuple[Float[Array, "b h w c"], Float[Array, ""]]:
    """Scaled latents and timestep for the next model call."""
    row = _row(sampler, state.index)
    return state.latents * row.input_scale, row.timestep


def step(
    sampler: Sampler, state: State, output: Float[Array, "b h w c"], noise: Float[Array, "b h w c"] | None = None
) -> State:
    """State after a model call.

    Args:
      output: the model's, guidance included.
      noise: standard normal, for a stochastic sampler.

    Raises:
      PSAError: a stochastic sampler without noise.
    """
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
    """Standard normal noise of one step.

    Args:
      keys: one a picture, so that no picture depends on its batch.
      index: of the step.
      shape: of one picture's latents.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def sample(
    sampler: Sampler,
    model: Callable[[Float[Array, "b h w c"], Float[Array, ""], Memory], tuple[Float[Array, "b h w c"], Memory]],
    noise: Float[Array, "b h w c"],
    keys: Key[Array, " b"] | None = None,
    memory: Memory = None,
) -> Float[Array, "b h w c"]:
    """Clean latents, sampled from standard normal noise.

    Args:
      model: (scaled latents, timestep, memory) -> prediction, guidance included, and the memory for the next call.
      noise: standard normal; scaled here to the sampler's first noise level.
      keys: one a picture, for a stochastic sampler. The key of `noise` itself can be used.
      memory: before the first call; None for a model that hands nothing on.

    Raises:
      PSAError: a stochastic sampler without keys.
    """
    if keys is None and sampler.stochastic:
        raise PSAError("this sampler is stochastic: give one key a picture")

    def call(carry: tuple[State, Memory], _: None) -> tuple[tuple[State, Memory], None]:
        state, memory = carry
        output, memory = model(*model_input(sampler, state), memory)
        fresh = step_noise(keys, state.index, noise.shape[1:]) if sampler.stochastic else None
        return (step(sampler, state, output, fresh), memory), None

    return jax.lax.scan(call, (start(sampler, noise), memory), None, length=sampler.calls)[0][0].latents


def guide(
    without: Float[Array, "b h w c"],
    with_prompt: Float[Array, "b h w c"],
    guidance: float | Float[Array, ""],
    rescale: float | Float[Array, ""] = 0.0,
) -> Float[Array, "b h w c"]:
    """Classifier-free guidance g = ε_∅ + w·(ε − ε_∅), rescaled: φ·g·std(ε)/std(g) + (1 − φ)·g.

    Args:
      without: unconditional output ε_∅.
      with_prompt: output ε for the prompt.
      guidance: w; 1 is the prompt alone.
      rescale: φ from 0 (no change) to 1 (each picture's output gets the standard deviation of its ε).

    Source: arXiv 2207.12598, equation 6; arXiv 2305.08891, section 3.4.
    """
    return rescaled(without + guidance * (with_prompt - without), with_prompt, rescale)


def rescaled(
    guided: Float[Array, "b h w c"], with_prompt: Float[Array, "b h w c"], rescale: float | Float[Array, ""]
) -> Float[Array, "b h w c"]:
    """φ·g·std(ε)/std(g) + (1 − φ)·g for a guided output g, the output ε for the prompt and φ = `rescale`."""
    axes = (1, 2, 3)
    ratio = with_prompt.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return guided * (rescale * ratio + (1.0 - rescale))
