"""One training step: state in, state and metrics out.

    draw_inputs → gradient of loss, or gradient_by_device of its parts → apply_update

The functions take the set-up first. `make_step` compiles them for its mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from psa_jax.interop.native import with_arrays
from psa_jax.preference.batch import Batch
from psa_jax.preference.draws import Draws, draw, draw_fixed
from psa_jax.preference.pair_loss import PairLosses, pair_losses, summarise
from psa_jax.training.optimizer import Arrays, moving_average
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import (
    DATA,
    FSDP,
    ROWS,
    check_batch,
    constrained,
    divided_axis,
    mean_in_parts,
    replicated,
)
from psa_jax.training.state import Frozen, Metrics, TrainState

Step = Callable[[TrainState, Frozen, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]


class PairInputs(NamedTuple):
    """Inputs of the loss with a row for each pair; `accumulate` divides them.

    Attributes:
      batch: the pair columns of a batch (`BatchSpec`).
      draws: random inputs.
      reference_errors: (rw, rl) where they are stored.
    """

    batch: Batch
    draws: Draws
    reference_errors: Float[Array, "b 2"] | None


def make_step(setup: Setup) -> Step:
    """The jitted step for a set-up: (state, frozen, batch, key) → (state, metrics). The state is donated.

    The UNet computes in the type that the base model's weights are in. Errors, losses and the adapter's arrays are
    float32. The batch is `setup.batch`, `frozen` is `setup.frozen()` with the reference errors where they are stored.

    Raises:
      PSAError: (when it is called first) a batch that devices and parts cannot share evenly.
    """
    whole = replicated(setup.mesh)
    return jax.jit(
        functools.partial(train_step, setup),
        in_shardings=(setup.state_sharding, setup.frozen_model_sharding, setup.batch_sharding, whole),
        out_shardings=(setup.state_sharding, whole),
        donate_argnums=0,
        compiler_options=setup.compiler_options,
    )


def train_step(
    setup: Setup, state: TrainState, frozen: Frozen, batch: Batch, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """One training step on one batch; pure, to be traced by jit.

    Args:
      batch: b pairs, as `setup.batch` says.
      key: of the run; the step's number is folded in.

    Returns:
      The next state, and scalar metrics of the batch (`summarise`, `gradient_norm`, `update_norm`).
    """
    pairs, shared = setup.batch.split(batch)
    check_batch(len(pairs["user"]), setup.mesh, setup.accumulate)
    with jax.named_scope("draw_inputs"):
        inputs = draw_inputs(setup, frozen, pairs, jax.random.fold_in(key, state.step))
    # Where they are divided they are gathered once: products with divided ones would exchange states in every layer.
    params = jax.lax.with_sharding_constraint(state.params, replicated(setup.mesh))
    if setup.accumulate == 1:
        grads, losses = gradient(setup, params, frozen, inputs, shared)
        grads = _divided(setup, grads)
    else:
        accumulate = accumulated_gradient if setup.divides_frozen else gradient_by_device
        grads, losses = accumulate(setup, params, frozen, inputs, shared)
    with jax.named_scope("optimizer"):
        state, norms = apply_update(setup, state, grads)
    return state, summarise(losses) | norms


def draw_inputs(setup: Setup, frozen: Frozen, pairs: Batch, key: PRNGKeyArray) -> PairInputs:
    """Draws the random inputs of a whole batch, so that neither its parts nor the devices change them."""
    schedule = dataclasses.replace(setup.schedule, alphas_cumprod=frozen.alphas_cumprod)
    if setup.fixed_draws is None:
        return PairInputs(pairs, draw(setup.objective, schedule, pairs, key), None)
    draws, number = draw_fixed(setup.fixed_draws, setup.objective, schedule, pairs, key)
    errors = frozen.reference_errors[pairs["row"], number]
    errors = jnp.where(pairs["swapped"][:, None], errors[:, ::-1], errors)
    return PairInputs(pairs, draws, errors)


def loss(
    setup: Setup, params: Arrays, frozen: Frozen, inputs: PairInputs, shared: Batch
) -> tuple[Float[Array, ""], PairLosses]:
    """The mean loss over pairs, and loss and metrics of each pair.

    Args:
      params: the adapter's arrays.
      shared: the shared columns of the batch.
    """
    model, adapter = setup.frozen_model(frozen), with_arrays(setup.adapter, params)
    found = pair_losses(
        setup.objective,
        adapter,
        model,
        inputs.batch | shared,
        inputs.draws,
        inputs.reference_errors,
        frozen.swap_distance,
    )
    return jnp.mean(found.values["loss"]), found


def gradient(
    setup: Setup, params: Arrays, frozen: Frozen, inputs: PairInputs, shared: Batch
) -> tuple[Arrays, PairLosses]:
    """The gradient of `loss` by the adapter's arrays, and loss and metrics of each pair."""

    def of_params(params: Arrays) -> tuple[Float[Array, ""], PairLosses]:
        with jax.named_scope("loss"):
            return loss(setup, params, frozen, inputs, shared)

    return jax.grad(of_params, has_aux=True)(params)


def gradient_by_device(
    setup: Setup, params: Arrays, frozen: Frozen, inputs: PairInputs, shared: Batch
) -> tuple[Arrays, PairLosses]:
    """`accumulated_gradient` whose devices exchange gradients after the last part, and not after each.

    Each device holds all frozen weights and works on its own pairs. Where parameters are divided over `fsdp`, gradients
    are summed over that axis after each part, so that a device keeps a part of the sum only; over `data` they wait. A
    pair's loss must not depend on pairs of other devices (`check_accumulate`).
    """
    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    # Sums of several devices next to each other, on a first axis.
    sums = jax.tree.map(
        lambda where: PartitionSpec(DATA, *where.spec) if divided_axis(where) is not None else rows,
        setup.state_sharding.params,
    )

    def of_device(*given: Any) -> tuple[Arrays, PairLosses]:
        grads, found = accumulated_gradient(setup, *given)
        return jax.tree.map(lambda x: x[None], grads), found

    of_devices = jax.shard_map(
        of_device,
        mesh=setup.mesh,
        in_specs=(whole, whole, rows, whole),
        out_specs=(sums, rows),
        check_vma=False,  # or gradients of what all devices hold would be summed over them in each part
    )
    grads, found = of_devices(params, frozen, inputs, shared)
    # Devices have equally many pairs, so that the mean over all pairs is the mean of theirs.
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), grads), found


def accumulated_gradient(
    setup: Setup, params: Arrays, frozen: Frozen, inputs: PairInputs, shared: Batch
) -> tuple[Arrays, PairLosses]:
    """The gradient of `loss`, computed on `setup.accumulate` parts of the batch one after the other."""

    def add(total: Arrays, part: PairInputs) -> tuple[Arrays, PairLosses]:
        grads, found = gradient(setup, params, frozen, part, shared)
        return jax.tree.map(jnp.add, total, _divided(setup, grads)), found

    shapes = jax.eval_shape(functools.partial(_divided, setup), params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    with jax.named_scope("accumulate"):
        total, found = jax.lax.scan(add, zeros, _in_parts(inputs, setup.accumulate, setup.mesh))
        # Parts are of equal size, so that the mean over all pairs is the mean of theirs.
        grads = jax.tree.map(lambda x: x / setup.accumulate, total)
    return grads, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), found)


def apply_update(setup: Setup, state: TrainState, grads: Arrays) -> tuple[TrainState, Metrics]:
    """The state after one step of the optimizer, and the norms of gradient and update."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies Python floats and int32 counters
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
    norms = {"gradient_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    params = optax.apply_updates(state.params, updates)
    average = moving_average(state.ema, params, setup.ema) if setup.ema else {}
    return TrainState(state.step + 1, params, opt_state, average), norms


def _in_parts(tree: PyTree[Array], count: int, mesh: Mesh) -> PyTree[Array]:
    """[b, …] to [count, b/count, …]: every count-th row is of the same part, so that no row leaves its device."""

    def part(x: Array) -> Array:
        parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrained(parts, NamedSharding(mesh, PartitionSpec(None, ROWS)))

    return jax.tree.map(part, tree)


def _divided(setup: Setup, grads: Arrays) -> Arrays:
    """Gradients where their parameters live, so that each device has and sums a part of them.

    In `jax.shard_map` they are the means over `fsdp`.
    """
    return jax.tree.map(mean_in_parts, grads, setup.state_sharding.params) if setup.mesh.shape[FSDP] > 1 else grads
