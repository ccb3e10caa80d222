"""The reference's errors on fixed draws: computed once before the first step, so that training runs no reference.

They depend on the frozen model, the rows and the draws alone. They lie in files, chunks of rows, whose names are hashes
of what they depend on: a pass that was stopped continues, and runs with other adapters, losses or seeds share a folder.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int
from safetensors.numpy import save

from psa_jax.data.chunks import Chunk, Encoded, plan_chunks
from psa_jax.data.pipeline import to_devices
from psa_jax.data.shards import Shards
from psa_jax.data.validation import batches_in_order
from psa_jax.errors import PSAError
from psa_jax.files import write_private
from psa_jax.interop.diffusers import weights_hash
from psa_jax.preference.batch import Batch
from psa_jax.preference.draws import draws_of_rows
from psa_jax.preference.pair_loss import compute_reference_errors
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import Progress
from psa_jax.training.distributed import array_of_main_process, by_main_process, is_main_process
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import by_rows, replicated
from psa_jax.training.state import Frozen

_FORMAT = "psa_jax.reference/1"
_CHUNK_BATCHES = 32


def _planned(
    folder: Path, settings: dict[str, Any], rows: list[str], size: int
) -> tuple[list[Chunk], Bool[np.ndarray, " c"]]:
    """The chunks, and which of their files exist."""
    chunks = plan_chunks(folder, settings, rows, size)
    return chunks, array_of_main_process(np.asarray([chunk.path.exists() for chunk in chunks]))


def reference_table(
    setup: Setup,
    frozen: Frozen,
    shared: Batch,
    shards: Shards,
    table: EmbeddingTable,
    folder: Path,
    *,
    batch_size: int,
    between: Callable[[], None],
) -> Float32[Array, "n k 2"]:
    """(rw, rl) of every row's own chosen and rejected picture on each of its fixed draws, on all devices of the mesh.

    All processes call it; the first one writes. Chunks that exist are read and not computed again.

    Args:
      setup: with fixed draws.
      frozen: as `setup.frozen()` gives it.
      shared: the shared columns of a batch.
      shards: the rows.
      table: embeddings of their users.
      folder: of the chunks; made where it is missing.
      batch_size: rows at a time, a multiple of the devices.
      between: called after every batch; may raise to stop.

    Raises:
      PSAError: an error that is not finite.
    """
    chunks, there = _find_chunks(setup, shards, folder, _CHUNK_BATCHES * batch_size)
    missing = [chunk for chunk, done in zip(chunks, there, strict=True) if not done]
    if missing:
        numbers = np.concatenate([chunk.items for chunk in missing])
        found = _errors_of_rows(setup, frozen, shared, shards, table, batch_size, numbers)
        with Progress(len(numbers), "row", "reference") as progress:
            for chunk in missing:
                errors = []
                while (ready := sum(map(len, errors))) < len(chunk.items):
                    errors.append(next(found))
                    progress.step(min(len(errors[-1]), len(chunk.items) - ready))  # the last batch is filled up
                    between()
                if is_main_process():
                    write_private(chunk.path, save({"errors": np.concatenate(errors)[: len(chunk.items)]}))
    read: list[np.ndarray] = []  # in process 0, whose disk the others may not see
    by_main_process(lambda: read.append(np.stack([row["errors"] for row in Encoded(chunks)])))
    shape = (len(shards), setup.fixed_draws.count, 2)
    whole = array_of_main_process(read[0] if read else np.empty(shape, np.float32))
    if not np.isfinite(whole).all():
        row = int(np.flatnonzero(~np.isfinite(whole).all(axis=(1, 2)))[0])
        raise PSAError(
            f"{folder}: the reference's error on row {row} of {shards.split} is not finite; check the model and the row"
        )
    return jax.device_put(whole, replicated(setup.mesh))


def make_reference_pass(setup: Setup) -> Callable[..., Float32[Array, "b 2"]]:
    """The jitted pass over a batch: (frozen, batch, number of the draw) → (rw, rl) of each pair.

    Args:
      setup: with fixed draws.
    """

    def measure(frozen: Frozen, batch: Batch, number: Any) -> Float32[Array, "b 2"]:
        model = setup.frozen_model(frozen, remat="none")
        numbers = jnp.broadcast_to(number, batch["row"].shape)
        draws = draws_of_rows(setup.fixed_draws, setup.objective, model.schedule, batch, numbers)
        return compute_reference_errors(model, batch, draws)

    return jax.jit(measure, out_shardings=replicated(setup.mesh), compiler_options=setup.compiler_options)


def _find_chunks(setup: Setup, shards: Shards, folder: Path, size: int) -> tuple[list[Chunk], Bool[np.ndarray, " c"]]:
    """The chunks of all rows, named by everything that errors depend on, and which of them exist."""
    schedule, objective, model = setup.schedule, setup.objective, setup.model
    settings = {
        "format": _FORMAT,
        "base_model": model.base_hash,
        "dtype": str(setup.dtype),
        "noise_schedule": schedule.alphas_cumprod.tolist(),
        "prediction": schedule.prediction,
        "shards": shards.info["inputs"],
        "split": shards.split,
        "draws": [setup.fixed_draws.count, setup.fixed_draws.seed],
        "timesteps": [objective.timestep_low, objective.timestep_high],
        "text_dropout": objective.text_dropout,
    }
    if setup.cached_text:
        settings["text"] = "cached"
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    rows = [str(row) for row in range(len(shards))]
    chunks, there = _planned(folder, settings, rows, size)
    if not there.any() and by_main_process(lambda: any(folder.glob("*.safetensors"))):
        # Perhaps of an earlier version, which knew the base model by the bytes of its files.
        older_chunks, older_there = _planned(folder, settings | {"base_model": weights_hash(model.folder)}, rows, size)
        if older_there.any():
            return older_chunks, older_there
    return chunks, there


def _errors_of_rows(
    setup: Setup,
    frozen: Frozen,
    shared: Batch,
    shards: Shards,
    table: EmbeddingTable,
    batch_size: int,
    rows: Int[np.ndarray, " n"],
) -> Iterator[Float32[np.ndarray, "b k 2"]]:
    """Reference errors of one batch of rows after the other, on the host; the last batch is filled up."""

    measure, whole = make_reference_pass(setup), replicated(setup.mesh)
    place = to_devices(by_rows(setup.mesh), tuple(setup.batch.pair_columns))
    each = jax.device_put(np.arange(setup.fixed_draws.count, dtype=np.int32), whole)
    for batch in batches_in_order(shards, table, rows, batch_size, jax.process_index(), jax.process_count()):
        placed = place(batch) | shared
        yield np.stack(jax.device_get([measure(frozen, placed, number) for number in each]), axis=1)
