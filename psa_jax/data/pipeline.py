"""Grain: shards to training batches, with a position that goes into the checkpoint.

    source → seed → shuffle → repeat → [process::processes] → map → batch → to_iter_dataset

The position is the number of batches drawn: `iterator.get_state()` is a small dict that JSON holds, and with
`grain.checkpoint.CheckpointSave(iterator)` / `CheckpointRestore(iterator)` it is one item of an Orbax checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from psa_jax.data.builder import RowColumns
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import EmbeddingTable


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows, as `builder.Shards`."""

    columns: RowColumns

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


def balanced_order(
    categories: Int[np.ndarray, " n"],
    kinds: Bool[np.ndarray, " n"],
    banned: Bool[np.ndarray, " n"],
    safe_share: float = 0.3,
    seed: int = 0,
) -> Int[np.ndarray, " m"]:
    """Row numbers, some repeated, in which a category alone does not tell which picture is preferred.

    In every category, unsafe-prompt rows of users who ban it and of users who allow it occur equally often: the rarer
    kind is repeated. Safe-prompt rows then make up `safe_share` of all (rounded to whole rows). No row is lost: where
    that share has no place for every safe row, the unsafe ones are repeated as a whole until it has. Inside one group
    the numbers of repetitions differ by at most one. With safe_share = 0 there are no safe rows.

    Args:
      categories: category number of each row.
      kinds: True for an unsafe prompt.
      banned: whether the row's user bans the category.
      safe_share: in [0, 1).
      seed: decides which rows get the extra repetition, and the order.

    Raises:
      PSAError: a category that all users ban, or none, so that it cannot be balanced; no safe rows; a bad share.
    """
    if not 0 <= safe_share < 1:
        raise PSAError(f"share of safe prompts is {safe_share}; give a number from 0 to below 1")
    rng = np.random.default_rng(seed)
    groups: list[tuple[np.ndarray, int]] = []
    for category in np.unique(categories[kinds]):
        here = kinds & (categories == category)
        bans, allows = np.flatnonzero(here & banned), np.flatnonzero(here & ~banned)
        if not bans.size or not allows.size:
            who = "bans" if not bans.size else "allows"
            raise PSAError(
                f"cannot balance: no user of this split {who} {CATEGORIES[category]}; add users or turn balancing off"
            )
        larger = max(bans.size, allows.size)
        groups += [(bans, larger), (allows, larger)]
    unsafe = sum(count for _, count in groups)
    if not unsafe:
        raise PSAError("cannot balance: there are no rows with unsafe prompts; turn balancing off")
    safe = np.flatnonzero(~kinds)
    ratio = safe_share / (1 - safe_share)  # safe rows for each unsafe one
    copies = 1
    if safe_share:
        if not safe.size:
            raise PSAError("cannot balance: there are no rows with safe prompts; set their share to 0")
        copies = max(1, int(np.ceil(safe.size / (unsafe * ratio))))
        groups = [(rows, count * copies) for rows, count in groups]
        groups.append((safe, round(unsafe * copies * ratio)))
    return rng.permutation(np.concatenate([_stretch(rows, count, rng) for rows, count in groups]))


def make_pipeline(
    source: RowSource,
    table: EmbeddingTable,
    *,
    batch_size: int,
    seed: int,
    balance: bool = True,
    safe_share: float = 0.3,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    read_threads: int = 4,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Batches of one process. The slices of all processes make up the data: once an epoch, in one global order.

    A batch is a dict of arrays, b = batch_size / process_count:
      chosen, rejected: [b, h, w, 2c] float32 VAE moments (mean, log-variance).
      input_ids (input_ids_2, …): [b, t] int32.
      user: [b, D] float32 embedding.
      banned: [b] bool, whether the user bans the category.
      kind: [b] int32, 1 for an unsafe prompt.
      category: [b] int32, position in CATEGORIES.
      row: [b] int32, row of the split, for error reports.

    Args:
      source: rows, such as `open_shards(…)`.
      table: embeddings of all users in it.
      batch_size: over all processes.
      seed: of shuffling and balancing.
      balance: order the rows by `balanced_order`; otherwise every row once an epoch.
      safe_share: for `balanced_order`.
      process_index, process_count: which slice of the global order.
      num_epochs: None repeats without end.
      shuffle: draw a new order every epoch.
      drop_remainder: drop the incomplete batch at the very end (for evaluation keep it).
      read_threads: threads that read and assemble batches; 0 does it in the caller's.
      prefetch: batches made ahead.

    Raises:
      PSAError: a batch that cannot be divided, a user who is not in the table, or data that cannot be balanced.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise PSAError(f"process {process_index} of {process_count} does not exist; count from 0")
    if batch_size < 1 or batch_size % process_count:
        raise PSAError(f"batch size {batch_size} cannot be divided among {process_count} processes; use a multiple")
    if not 0 <= seed < 2**32:
        raise PSAError(f"seed is {seed}; give 0 to {2**32 - 1}")
    columns = source.columns
    order = (
        balanced_order(columns.categories, columns.unsafe, columns.banned, safe_share, seed)
        if balance
        else np.arange(len(source))
    )
    if num_epochs is not None and drop_remainder and len(order) * num_epochs < batch_size:
        raise PSAError(f"{len(order)} rows do not fill one batch of {batch_size}; use a smaller batch or more data")
    dataset = grain.MapDataset.source(_Order(order)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs)[process_index::process_count]
    dataset = dataset.map(_Load.of(source, table))
    dataset = dataset.batch(batch_size // process_count, drop_remainder=drop_remainder)
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch if read_threads else 0)
    return dataset.to_iter_dataset(options)


@dataclass(frozen=True, eq=False, repr=False)
class _Order:
    """Row numbers as a Grain source."""

    rows: Int[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        return int(self.rows[index])

    def __repr__(self) -> str:  # Grain shows it in errors
        return f"rows({len(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Load:
    """Row number to one element of a batch."""

    source: RowSource
    embeddings: Float32[np.ndarray, "users d"]
    user_of_row: Int32[np.ndarray, " n"]

    @classmethod
    def of(cls, source: RowSource, table: EmbeddingTable) -> "_Load":
        """Looks all users up at once: an unknown one is an error before the first step."""
        users, user_of_row = np.unique(np.asarray(source.columns.user_ids), return_inverse=True)
        return cls(source, table.lookup([str(user) for user in users]), user_of_row.astype(np.int32))

    def __call__(self, row: int) -> dict[str, np.ndarray]:
        example = self.source[row]
        return {
            "chosen": example["moments_chosen"].astype(np.float32),
            "rejected": example["moments_rejected"].astype(np.float32),
            **{name: value for name, value in example.items() if name.startswith("input_ids")},
            "user": self.embeddings[self.user_of_row[row]],
            "banned": np.asarray(example["banned"], np.bool_),
            "kind": np.asarray(example["kind"], np.int32),
            "category": np.asarray(example["category"], np.int32),
            "row": np.asarray(row, np.int32),
        }


def _stretch(rows: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """`count` of `rows`, each as often as every other or once more."""
    times, extra = divmod(count, rows.size)
    return np.concatenate([np.tile(rows, times), rng.choice(rows, extra, replace=False)])
