"""One training step: state in, state and metrics out."""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.attention import REMAT, ComputeOptions
from psa_jax.models.fused_attention import fused_attention
from psa_jax.preference.draws import Batch, Stored, draw, draw_stored
from psa_jax.preference.losses import LOSSES
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import Base, batch_arrays, pair_losses, summarise
from psa_jax.seeds import check_seed
from psa_jax.training.optimizer import Arrays, moving_average
from psa_jax.training.sharding import FSDP, REPLICATED, ROWS, by_rows, check_batch, replicated, shardings

Metrics = dict[str, Float[Array, ""]]

# Left to itself, XLA rounds to bfloat16 only between operations that it does not fuse, and it fuses the policy, whose
# intermediate results the backward pass needs, otherwise than the reference. Less of the rounding then cancels.
NO_EXCESS_PRECISION = {"xla_allow_excess_precision": False}


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]
    params: Arrays  # the adapter's arrays by name, float32 whatever the step computes in
    opt_state: optax.OptState
    ema: Arrays  # their exponential moving average; empty where none is asked for

    @property
    def exported(self) -> Arrays:
        """What a run is for: the average where there is one."""
        return self.ema or self.params


class Frozen(NamedTuple):
    """Everything that it does not; an argument of the step, since closed over it would become a constant."""

    weights: nnx.State  # of (UNet, text encoders)
    alphas_cumprod: Float[Array, " t"]  # of the noise schedule
    reference: Float[Array, "n k 2"] | None = None  # its errors (rw, rl) on the stored draws of every row


Opened = Callable[[Frozen], Base]
Step = Callable[[TrainState, Frozen, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]


def init_state(
    config: AdapterConfig, optimizer: optax.GradientTransformation, seed: int, *, ema: float = 0.0
) -> TrainState:
    """An untrained adapter. `ema` as in `make_step`."""
    params = adapter_arrays(Adapter(config, rngs=nnx.Rngs(check_seed(seed))))
    # Copied: the step is given its buffers to use again, and no two may be the same.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def opened(model: StableDiffusion, mesh: Mesh, remat: str = "none") -> Opened:
    """What makes the base model out of frozen weights, inside a jitted function whose batches are split over a mesh."""
    compute = ComputeOptions(remat, fused_attention(mesh, by_rows(mesh).spec))
    graph, _ = nnx.split((model.unet, model.text_encoders))
    prediction, vae = NoiseSchedule.from_config(model.scheduler_config).prediction, model.vae.config

    def base(frozen: Frozen) -> Base:
        unet, text_encoders = nnx.merge(graph, frozen.weights)
        unet.compute = compute
        return Base(unet, text_encoders, NoiseSchedule(frozen.alphas_cumprod, prediction), vae)

    return base


def check_parts(objective: Objective, accumulate: int) -> None:
    """Raises PSAError where a step is worked on in parts and the loss looks at all of its pairs together."""
    if accumulate > 1 and LOSSES[objective.loss].whole_batch:
        raise PSAError(f"accumulate = {accumulate}: {objective.loss} compares pairs of a batch; set accumulate to 1")


def make_step(
    model: StableDiffusion,
    config: AdapterConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    remat: str = "none",
    ema: float = 0.0,
    frozen: str = REPLICATED,
    stored: Stored | None = None,
) -> tuple[Step, Frozen]:
    """The jitted step (its state is donated) and the frozen weights, placed on the mesh.

    The UNet computes in the type that the model's weights are in. Errors, losses and the adapter's arrays are float32.

    Args:
      model: its weights may be abstract; then so is what is returned, and nothing but shapes can be learnt from it.
      accumulate: parts of a batch that are worked on one after the other; the result is that of the whole batch.
      remat: what is stored for the backward pass, a key of `psa_jax.models.attention.REMAT`.
      ema: decay of the moving average of the adapter; 0 for none.
      frozen: where the frozen weights live, a key of `psa_jax.training.sharding.RULES`.
      stored: draws whose reference errors are to be put into what is returned (`psa_jax.training.reference`); the step
        then draws among them and runs no reference.
    """
    if remat not in REMAT:
        raise PSAError(f"remat = {remat!r} is unknown; use one of {', '.join(REMAT)}")
    if not 0.0 <= ema < 1.0:
        raise PSAError(f"optimizer.ema = {ema}; give a decay from 0 (none) to below 1")
    check_parts(objective, accumulate)
    base_of, weights = opened(model, mesh, remat), nnx.state((model.unet, model.text_encoders))
    whole, rows = replicated(mesh), by_rows(mesh)
    frozen_at = Frozen(shardings(weights, mesh, frozen), whole, None if stored is None else whole)
    schedule = NoiseSchedule.from_config(model.scheduler_config)
    alphas = schedule.alphas_cumprod
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights)):
        alphas = jax.ShapeDtypeStruct(alphas.shape, alphas.dtype)
    held = jax.tree.map(_placed, Frozen(weights, alphas), frozen_at._replace(reference=None))
    state_at = shardings(jax.eval_shape(lambda: init_state(config, optimizer, 0, ema=ema)), mesh)
    of_pairs, of_all = batch_arrays(len(model.text_encoders), stored is not None)

    def step(state: TrainState, held: Frozen, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        pairs = {name: batch[name] for name in of_pairs}
        check_batch(len(pairs["user"]), mesh, accumulate)
        noising = base_of(held).schedule
        # Of the whole batch, so that neither its parts nor the devices change what is drawn.
        key, known = jax.random.fold_in(key, state.step), None
        if stored is None:
            draws = draw(objective, noising, batch, key)
        else:
            draws, number = draw_stored(stored, objective, noising, batch, key)
            known = held.reference[batch["row"], number]
            known = jnp.where(batch["swapped"][:, None], known[:, ::-1], known)

        def loss(params, part):
            pairs, draws, known = part
            base = base_of(held)
            inputs = pairs | {name: batch[name] for name in of_all}
            adapter = with_arrays(config, params)
            found = pair_losses(objective, adapter, base, inputs, draws, known)
            return jnp.mean(found.values["loss"]), found

        def gradient_of(part):
            gradient, found = jax.grad(loss, has_aux=True)(state.params, part)
            if mesh.shape[FSDP] > 1:  # summed over the devices in parts, each where its parameter lives
                gradient = jax.lax.with_sharding_constraint(gradient, state_at.params)
            return gradient, found

        if accumulate == 1:
            gradient, found = gradient_of((pairs, draws, known))
        else:

            def add(total, part):
                gradient, found = gradient_of(part)
                return jax.tree.map(jnp.add, total, gradient), found

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            total, found = jax.lax.scan(add, zeros, _parts((pairs, draws, known), accumulate, mesh))
            # Parts are of equal size, so that the mean over all pairs is the mean of theirs.
            gradient = jax.tree.map(lambda x: x / accumulate, total)
            found = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), found)

        with jax.numpy_dtype_promotion("standard"):  # optax multiplies Python floats and int32 counters
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        norms = {"gradient_norm": optax.tree.norm(gradient), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        average = moving_average(state.ema, params, ema) if ema else {}
        return TrainState(state.step + 1, params, opt_state, average), summarise(found) | norms

    batch_at = dict.fromkeys(of_pairs, rows) | dict.fromkeys(of_all, whole)
    jitted = jax.jit(
        step,
        in_shardings=(state_at, frozen_at, batch_at, whole),
        out_shardings=(state_at, whole),
        donate_argnums=0,
        compiler_options=None if model.unet.conv_in.kernel.dtype == jnp.float32 else NO_EXCESS_PRECISION,
    )
    return jitted, held


def compiled(step: Step, *inputs: Any) -> Step:
    """The step for such inputs. What compiling took is given back: glibc would keep it, 1 GB for SD1.5 on a CPU."""
    found = step.lower(*inputs).compile()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return found


def _placed(leaf: Any, where: NamedSharding) -> Any:
    """An array put where it belongs; a shape told where it would be."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)


def _parts(tree: PyTree[Array], count: int, mesh: Mesh) -> PyTree[Array]:
    """[b, …] to [count, b/count, …]: every count-th row is of the same part, so that no row leaves its device."""
    where = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def part(x: Array) -> Array:
        parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, where)

    return jax.tree.map(part, tree)
