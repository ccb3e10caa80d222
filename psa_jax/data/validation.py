"""Held-out batches that are the same every time: rows, noise and timesteps depend on the seed and on nothing else."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int, Int32

from psa_jax.data.pipeline import Place, RowSource, make_pipeline
from psa_jax.errors import PSAError
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.seeds import check_seed


def validation_batches(
    source: RowSource,
    table: EmbeddingTable,
    *,
    batch_size: int,
    seed: int,
    rows: int | None = None,
    timesteps: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
    place: Place | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of held-out rows, each row once, as `make_pipeline` makes them (in order, never mirrored), and also with
      noise: [b, h, w, c] float32, standard normal, of the latents' shape; both pictures of a pair share it.
      timesteps: [b] int32; all rows together cover 0 to `timesteps` − 1 evenly.

    Noise and timestep of a row do not depend on the batch size or on the number of processes, so that losses can be
    compared between checkpoints and between runs. The last batch is filled up with copies of the last row.

    Args:
      source: the held-out split.
      table: embeddings of all users in it.
      batch_size: over all processes.
      seed: of the selection of rows, the noise and the timesteps.
      rows: how many, sampled from all; None takes all.
      timesteps: of the noise schedule.
      process_index, process_count, place: as in `make_pipeline`.

    Raises:
      PSAError: a number of rows that the split does not have, or a seed out of range.
    """
    total = len(source)
    count = total if rows is None else rows
    if not 1 <= count <= total:
        raise PSAError(f"validation of {count} rows: the split has {total}; use 1 to {total}")
    check_seed(seed, "validation: the seed")
    selected = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    times = dict(zip(selected.tolist(), spread_timesteps(count, timesteps, seed).tolist(), strict=True))
    batches = batches_in_order(source, table, selected, batch_size, process_index, process_count)
    for batch in batches:
        shape = (*batch["chosen"].shape[1:-1], batch["chosen"].shape[-1] // 2)
        batch |= {
            "noise": np.stack([row_noise(int(row), shape, seed) for row in batch["row"]]),
            "timesteps": np.asarray([times[int(row)] for row in batch["row"]], np.int32),
        }
        yield batch if place is None else place(batch)


def batches_in_order(
    source: RowSource,
    table: EmbeddingTable,
    rows: Int[np.ndarray, " n"],
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the given rows, unchanged, each once and in this order; the last row fills up the last batch.

    Args:
      source, table, batch_size: as in `make_pipeline`.
      rows: row numbers of `source`.
      process_index, process_count: as in `make_pipeline`: every process has as many rows of every batch.
    """
    order = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch_size)])
    batches = make_pipeline(
        _Rows(source, order),
        table,
        batch_size=batch_size,
        seed=0,
        balance="none",
        shuffle=False,
        num_epochs=1,
        process_index=process_index,
        process_count=process_count,
    )
    for batch in batches:
        yield batch | {"row": order[batch["row"]].astype(np.int32)}


def row_noise(row: int, shape: tuple[int, ...], seed: int) -> Float32[np.ndarray, "..."]:
    """Standard normal noise that depends only on the row, the shape and the seed.

    Args:
      row: number of the row.
      shape: of the noise.
      seed: of the validation.
    """
    return np.random.default_rng((seed, row)).standard_normal(shape, np.float32)


def spread_timesteps(count: int, timesteps: int, seed: int) -> Int32[np.ndarray, " n"]:
    """Samples one timestep from each of `count` equal parts of [0, timesteps), in random order.

    Args:
      count: number of timesteps.
      timesteps: of the noise schedule.
      seed: of the random choices.
    """
    rng = np.random.default_rng((seed, count, timesteps))
    parts = (rng.permutation(count) + rng.random(count)) / count
    return (parts * timesteps).astype(np.int32)


class _Rows:
    """Some rows of a source, in a given order."""

    def __init__(self, source: RowSource, order: np.ndarray):
        columns = source.columns
        self._source, self._order = source, order
        users = [columns.user_ids[row] for row in order]
        arrays = (columns.categories, columns.unsafe, columns.banned, columns.twins)
        self.columns = type(columns)(users, *(array[order] for array in arrays))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int):
        return self._source[int(self._order[index])]
