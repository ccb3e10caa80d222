"""The arrays of a training step: those that it changes, and the frozen ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.interop.native import adapter_arrays
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.seeds import check_seed
from psa_jax.training.optimizer import Arrays

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      step: number of steps done.
      params: the adapter's arrays by name, float32 whatever type the step computes in.
      opt_state: of the optimizer.
      ema: exponential moving average of `params`; empty where none is asked for.
    """

    step: Int[Array, ""]
    params: Arrays
    opt_state: optax.OptState
    ema: Arrays

    @property
    def exported(self) -> Arrays:
        """The arrays of the adapter file: the moving average where there is one."""
        return self.ema or self.params


class Frozen(NamedTuple):
    """What training never changes. Passed to the step as an argument: a closed-over array would be compiled in.

    Attributes:
      weights: of (UNet, text encoders).
      alphas_cumprod: ᾱ of the noise schedule.
      reference_errors: (rw, rl) of the reference for n rows and their K fixed draws.
      swap_distance: how far apart the reference's predictions for a banned prompt and its safe one are, as
        `pair_loss.swap_distances`, on average over each of `metrics.TIME_PARTS`.
    """

    weights: nnx.State
    alphas_cumprod: Float[Array, " t"]
    reference_errors: Float[Array, "n k 2"] | None = None
    swap_distance: Float[Array, " parts"] | None = None


def init_state(
    config: AdapterConfig, optimizer: optax.GradientTransformation, seed: int, *, ema: float = 0.0
) -> TrainState:
    """The state before the first step, with an untrained adapter.

    Args:
      config: of the adapter.
      optimizer: whose state it holds.
      seed: of the adapter's initial values.
      ema: decay of the moving average; 0 for none.
    """
    params = adapter_arrays(Adapter(config, rngs=nnx.Rngs(check_seed(seed))))
    # Copied: the step is given its buffers to use again, and no two may be the same.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)
