"""The reference's errors on stored draws: run once before the first step, so that training runs no reference.

They depend on the frozen model, the rows and the draws alone. They lie in chunks of rows under names that say what they
depend on: a pass that was stopped goes on, and runs with other adapters, losses or seeds share a folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32
from safetensors.numpy import save

from psa_jax.data.chunks import Chunk, Encoded, plan_chunks
from psa_jax.data.pipeline import to_devices
from psa_jax.data.shards import Shards
from psa_jax.data.validation import batches_in_order
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.files import write_private
from psa_jax.interop.diffusers import StableDiffusion, weights_hash
from psa_jax.preference.draws import Batch, Stored, of_rows
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import batch_arrays, reference_errors
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import Progress
from psa_jax.seeds import check_seed
from psa_jax.training.distributed import any_process, is_main_process
from psa_jax.training.sharding import by_rows, replicated
from psa_jax.training.step import NO_EXCESS_PRECISION, Frozen, opened

_FORMAT = "psa_jax.reference/1"
_CHUNK_BATCHES = 32


def stored_or_none(count: int, seed: int, objective: Objective, *, flips: bool) -> Stored | None:
    """What a configuration asks for; None where `count` is 0.

    Raises:
      PSAError: an objective or shards for which errors do not say enough.
    """
    if count == 0:
        return None
    if count < 0:
        raise PSAError(f"reference.draws is {count}; give a number of draws for each pair, or 0 to store nothing")
    if not objective.needs_reference:
        raise PSAError(f"reference.draws is {count}, but {objective.loss} runs no reference; set it to 0")
    if objective.reference_kl_weight > 0.0:
        raise PSAError(
            f"reference.draws is {count}, but objective.reference_kl_weight compares predictions, and only errors "
            "are stored; set one of the two to 0"
        )
    if flips:
        raise PSAError(
            f"reference.draws is {count}, but these shards hold mirrored pictures, too; build shards without --flips"
        )
    return Stored(count, check_seed(seed, "reference.seed"))


def _asked_of_one(value: Any) -> np.ndarray:
    """What the first process finds, so that all do the same."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _planned(
    folder: Path, settings: dict[str, Any], rows: list[str], size: int
) -> tuple[list[Chunk], Bool[np.ndarray, " c"]]:
    """The chunks, and which of them are there."""
    chunks = plan_chunks(folder, settings, rows, size)
    return chunks, _asked_of_one([chunk.path.exists() for chunk in chunks])


def reference_table(
    folder: Path,
    stored: Stored,
    model: StableDiffusion,
    objective: Objective,
    frozen: Frozen,
    shards: Shards,
    table: EmbeddingTable,
    mesh: Mesh,
    *,
    empty: Batch,
    batch_size: int,
    base_hash: str,
    between: Callable[[], None],
) -> Float32[Array, "n k 2"]:
    """(rw, rl) of every row's own chosen and rejected picture on each of its draws, on all devices of the mesh.

    All processes call it; the first one writes. What is there already is not run again.

    Args:
      folder: of the chunks; made where it is missing.
      frozen: as `make_step` gives it.
      empty: the arrays of a batch that are the same for all rows.
      batch_size: rows at a time, a multiple of the devices.
      base_hash: of the base model's weights.
      between: called after every batch; may raise to stop.
    """
    dtype, schedule = model.unet.conv_in.kernel.dtype, NoiseSchedule.from_config(model.scheduler_config)
    settings = {
        "format": _FORMAT,
        "base_model": base_hash,
        "dtype": str(dtype),
        "noise_schedule": schedule.alphas_cumprod.tolist(),
        "prediction": schedule.prediction,
        "shards": shards.info["inputs"],
        "split": shards.split,
        "draws": [stored.count, stored.seed],
        "timesteps": [objective.timestep_low, objective.timestep_high],
        "text_dropout": objective.text_dropout,
    }
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    rows = [str(row) for row in range(len(shards))]
    chunks, there = _planned(folder, settings, rows, _CHUNK_BATCHES * batch_size)
    if not there.any() and _asked_of_one(any(folder.glob("*.safetensors"))):
        # Perhaps of an earlier version, which knew the base model by the bytes of its files.
        older = settings | {"base_model": weights_hash(model.folder)}
        older_chunks, older_there = _planned(folder, older, rows, _CHUNK_BATCHES * batch_size)
        if older_there.any():
            chunks, there = older_chunks, older_there
    missing = [chunk for chunk, done in zip(chunks, there, strict=True) if not done]
    if missing:
        numbers = np.concatenate([chunk.items for chunk in missing])
        found = _run(stored, model, objective, frozen, shards, table, mesh, empty, batch_size, numbers)
        with Progress(len(numbers), "row", "reference") as progress:
            for chunk in missing:
                errors = []
                while (there := sum(map(len, errors))) < len(chunk.items):
                    errors.append(next(found))
                    progress.step(min(len(errors[-1]), len(chunk.items) - there))  # the last batch is filled up
                    between()
                if is_main_process():
                    write_private(chunk.path, save({"errors": np.concatenate(errors)[: len(chunk.items)]}))
        any_process(False)  # the others wait for the last file
    whole = np.stack([row["errors"] for row in Encoded(chunks)])
    if not np.isfinite(whole).all():
        row = int(np.flatnonzero(~np.isfinite(whole).all(axis=(1, 2)))[0])
        raise PSAError(
            f"{folder}: the reference's error on row {row} of {shards.split} is not finite; check the model and the row"
        )
    return jax.device_put(whole, replicated(mesh))


def _run(stored, model, objective, frozen, shards, table, mesh, empty, batch_size, numbers):
    """[b, K, 2] for one batch of rows after the other, on the host."""
    base_of = opened(model, mesh)

    def measure(frozen: Frozen, batch: Batch, number: Any):
        base = base_of(frozen)
        draws = of_rows(stored, objective, base.schedule, batch, jnp.broadcast_to(number, batch["row"].shape))
        return reference_errors(base, batch, draws)

    options = None if model.unet.conv_in.kernel.dtype == jnp.float32 else NO_EXCESS_PRECISION
    measure = jax.jit(measure, out_shardings=replicated(mesh), compiler_options=options)
    place = to_devices(by_rows(mesh), batch_arrays(len(model.text_encoders), True)[0])
    each = jax.device_put(np.arange(stored.count, dtype=np.int32), replicated(mesh))
    processes = jax.process_index(), jax.process_count()
    for batch in batches_in_order(shards, table, numbers, batch_size, *processes):
        placed = place(batch) | empty
        yield np.stack(jax.device_get([measure(frozen, placed, number) for number in each]), axis=1)
