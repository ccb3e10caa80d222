"""One training step: state in, state and metrics out."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.adapter import Adapter, AdapterConfig
from psa_jax.preference.objective import Batch, Objective, batch_arrays, preference_loss
from psa_jax.training.sharding import by_rows, replicated

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]
    params: dict[str, Float[Array, "..."]]  # the adapter's arrays by name
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """Everything that it does not; an argument of the step, since closed over it would become a constant."""

    weights: nnx.State  # of (UNet, text encoders)
    schedule: NoiseSchedule


def init_state(config: AdapterConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """An untrained adapter."""
    params = adapter_arrays(Adapter(config, rngs=nnx.Rngs(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_step(
    model: StableDiffusion,
    config: AdapterConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[Callable[[TrainState, Frozen, Batch, PRNGKeyArray], tuple[TrainState, Metrics]], Frozen]:
    """The jitted step (its state is donated) and the frozen weights, placed on the mesh."""
    graph, weights = nnx.split((model.unet, model.text_encoders))
    schedule = NoiseSchedule.from_config(model.scheduler_config)
    frozen = jax.device_put(Frozen(weights, schedule), replicated(mesh))
    vae = model.vae.config

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        def loss(params):
            unet, text_encoders = nnx.merge(graph, frozen.weights)
            adapter = with_arrays(config, params)
            step_key = jax.random.fold_in(key, state.step)
            return preference_loss(objective, adapter, unet, text_encoders, frozen.schedule, vae, batch, step_key)

        gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies Python floats and int32 counters
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics |= {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    whole, rows = replicated(mesh), by_rows(mesh)
    of_pairs, of_all = batch_arrays(len(model.text_encoders))
    batch_sharding = dict.fromkeys(of_pairs, rows) | dict.fromkeys(of_all, whole)
    jitted = jax.jit(
        step,
        in_shardings=(whole, whole, batch_sharding, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
    return jitted, frozen
