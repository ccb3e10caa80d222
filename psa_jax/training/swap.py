"""How much a swap of the prompt changes the base model's predictions: the unit of swap distillation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from psa_jax.data.pipeline import to_devices
from psa_jax.data.shards import Shards
from psa_jax.data.validation import batches_in_order
from psa_jax.errors import PSAError
from psa_jax.preference.batch import Batch
from psa_jax.preference.draws import FixedDraws, draws_of_rows
from psa_jax.preference.metrics import TIME_PARTS
from psa_jax.preference.pair_loss import swap_distances
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import by_rows, replicated
from psa_jax.training.state import Frozen

MOST_ROWS = 256
"""Rows that are looked at; their mean is good to a few percent."""


def mean_swap_distance(
    setup: Setup, frozen: Frozen, shared: Batch, shards: Shards, table: EmbeddingTable, *, batch_size: int
) -> Float[Array, " parts"]:
    """Mean of `swap_distances` over banned prompts, for each of `metrics.TIME_PARTS`; on all devices.

    The same rows, noise and timesteps for the same shards: a run that continues finds the same numbers.

    Args:
      setup: with swap distillation.
      frozen: as `setup.frozen()` gives it.
      shared: the shared columns of a batch.
      shards: the rows.
      table: embeddings of their users.
      batch_size: rows at a time, a multiple of the devices.

    Raises:
      PSAError: no banned prompt whose safe prompt is known, or a distance that is not finite or 0.
    """
    rows = _rows_to_measure(shards, batch_size)
    objective = dataclasses.replace(setup.objective, timestep_low=0.0, timestep_high=1.0, text_dropout=0.0)
    parts = FixedDraws(len(TIME_PARTS))

    def measure(frozen: Frozen, batch: Batch, number: Int[Array, ""]) -> Float[Array, ""]:
        model = setup.frozen_model(frozen, remat="none")
        draws = draws_of_rows(parts, objective, model.schedule, batch, jnp.broadcast_to(number, batch["row"].shape))
        return jnp.mean(swap_distances(model, batch, draws))

    whole = replicated(setup.mesh)
    measure = jax.jit(measure, out_shardings=whole, compiler_options=setup.compiler_options)
    names = tuple({*setup.batch.pair_columns, "row", "swapped"})
    place = to_devices(by_rows(setup.mesh), names)
    numbers = jax.device_put(np.arange(len(TIME_PARTS), dtype=np.int32), whole)
    found = []
    for batch in batches_in_order(shards, table, rows, batch_size, jax.process_index(), jax.process_count()):
        placed = place(batch) | shared
        found.append([measure(frozen, placed, number) for number in numbers])
    means = np.mean(jax.device_get(found), axis=0, dtype=np.float32)
    if not (np.isfinite(means).all() and (means > 0.0).all()):
        raise PSAError(
            f"swap distillation: unsafe and safe prompts of {shards.split} change the base model's predictions by "
            f"{means.tolist()}; check the model and the prompts"
        )
    return jax.device_put(means, whole)


def _rows_to_measure(shards: Shards, batch_size: int) -> Int[np.ndarray, " n"]:
    """Rows over the whole split, in full batches where there are enough of them."""
    columns = shards.columns
    rows = np.flatnonzero(columns.unsafe & columns.banned & columns.twins)
    if not len(rows):
        raise PSAError(
            f"{shards.folder}: objective.swap_weight needs the safe prompts of banned unsafe ones, and no row of "
            f"{shards.split} has one; build the shards from a folder with both rows of each pair, or set it to 0"
        )
    count = min(len(rows), max(MOST_ROWS // batch_size, 1) * batch_size)
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
