"""Grain pipeline: shards to training batches, with a position that goes into the checkpoint.

    rows in order → seed → shuffle → repeat → sample → [position :] → this process's block of every batch → load → batch
    → device

Sampled for each example: its user, and whether its pair is mirrored. The position is the number of examples that all
processes together have taken. `iterator.get_state()` is a small JSON dict, the same in every process, so that a run can
continue with other numbers of processes and other batch sizes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jaxtyping import Float32, Int, Int32

from psa_jax.data.balancing import UserSampler, row_order
from psa_jax.data.shards import RowColumns
from psa_jax.errors import PSAError
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.prompt_columns import SAFE, is_prompt
from psa_jax.seeds import check_seed

Place = Callable[[dict[str, np.ndarray]], dict[str, Any]]
"""Moves a batch of this process to its devices."""

_FLIPPED = "_flipped"
_PREFETCH = 4  # batches read ahead by the reading threads


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows, as `shards.Shards` gives it."""

    columns: RowColumns

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        """A row, by the names of its columns."""
        ...


def make_pipeline(
    source: RowSource,
    table: EmbeddingTable,
    *,
    batch_size: int,
    seed: int,
    balance: str = "users",
    safe_share: float = 0.3,
    banned_share: float = 0.5,
    flips: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    read_threads: int = 4,
    place: Place | None = None,
) -> grain.IterDataset:
    """Batches of one process: its block of each batch. The blocks of all processes in order are the whole batch.

    A batch is a dict of arrays (`_Load` makes its rows), with b = batch_size / process_count:
      chosen, rejected: [b, h, w, 2c] float16 VAE moments (mean, log-variance).
      input_ids (input_ids_2, …): [b, t] int32.
      text_states, text_pooled: [b, t, c] and [b, p] float16, if the shards have them.
      safe_input_ids, safe_text_states, …: the same of the safe prompt of the row's pair.
      twin: [b] bool, whether that prompt is known; the row's own stands in for one that is not.
      original_size, crop: [b, 2] int32, in pixels, of the picture before mirroring: SDXL's conditions.
      user: [b, D] float32 embedding.
      banned: [b] bool, whether that user bans the category.
      swapped: [b] bool, whether that user prefers the picture that is the rejected one of the row.
      unsafe: [b] bool, whether the prompt is the unsafe one.
      row: [b] int32, row of the split, for error reports.

    Args:
      source: rows, such as `open_shards(…)`.
      table: embeddings of all users in `source`.
      batch_size: over all processes.
      seed: of shuffling, balancing, sampling users and flipping.
      balance: "users" combines every unsafe prompt with a sampled user of this split, who bans its category in
        `banned_share` of the cases and prefers what SAGE's label rule says. "rows" keeps the user of every row and
        repeats rows as `balanced_order` says. "none" takes every row as it is, once an epoch.
      safe_share: share of safe prompts in all rows, unless balance is "none".
      banned_share: see `balance`.
      flips: mirror the pair with probability 1/2, sampled again in every epoch.
      process_index, process_count: which block of every batch.
      num_epochs: None repeats without end.
      shuffle: shuffle again in every epoch.
      drop_remainder: drop the incomplete batch at the very end.
      read_threads: threads that read and assemble batches; 0 does it in the caller's.
      place: moves a batch to its devices, in a thread of its own and two batches ahead; see `to_devices`.

    Raises:
      PSAError: a batch that cannot be divided, a user who is not in the table, data that cannot be balanced, or
        flips of shards that have none.
    """
    _check_batches(batch_size, process_index, process_count)
    check_seed(seed)
    if flips and f"moments_chosen{_FLIPPED}" not in source[0]:
        raise PSAError("the shards hold no mirrored pictures; build them with --flips or train without")
    order = row_order(source.columns, balance, safe_share, seed)
    if num_epochs is not None and drop_remainder and len(order) * num_epochs < batch_size:
        raise PSAError(f"{len(order)} rows do not fill one batch of {batch_size}; use a smaller batch or more data")
    dataset = grain.MapDataset.source(_Order(order)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # Sampled here, keyed by the position in the global order: the same however batches are divided.
    sample = _Sample(flips, UserSampler.of(source.columns, banned_share) if balance == "users" else None)
    examples = dataset.repeat(num_epochs).random_map(sample).map(_Load.of(source, table))
    endless = num_epochs is None
    batches = _BatchesFrom(
        examples, batch_size, process_index, process_count, endless, drop_remainder, read_threads, place
    )
    return _Batches(batches, batch_size, len(examples))


def to_devices(sharding: jax.sharding.Sharding, names: tuple[str, ...]) -> Place:
    """A `Place` that makes each process's rows its part of arrays over all devices.

    Args:
      sharding: of the arrays, along rows.
      names: the columns that the training step takes; the others are dropped.
    """

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in names}

    return place


def _check_batches(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1 or not 0 <= process_index < process_count:
        raise PSAError(f"process {process_index} of {process_count} does not exist; count from 0")
    if batch_size < 1 or batch_size % process_count:
        raise PSAError(f"batch size {batch_size} cannot be divided among {process_count} processes; use a multiple")


# --- row numbers to the rows of a batch, in the order of the pipeline


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


class _Example(NamedTuple):
    """A row, with what was sampled for it.

    Args:
      row: its number.
      user: index of the sampled user; None keeps the row's own.
      banned: whether the sampled user bans the category.
      flipped: whether the pair is mirrored.
    """

    row: int
    user: int | None
    banned: bool
    flipped: bool


@dataclass(frozen=True, eq=False)
class _Sample:
    """Row number → example."""

    flips: bool
    users: UserSampler | None

    def __call__(self, row: int, rng: np.random.Generator) -> _Example:
        flipped = self.flips and bool(rng.integers(2))
        if self.users is None or not self.users.columns.unsafe[row]:
            return _Example(row, None, False, flipped)
        return _Example(row, *self.users.sample(row, rng), flipped)


@dataclass(frozen=True, eq=False, repr=False)
class _Load:
    """Example → one row of a batch."""

    source: RowSource
    embeddings: Float32[np.ndarray, "users d"]
    user_of_row: Int32[np.ndarray, " n"]

    @classmethod
    def of(cls, source: RowSource, table: EmbeddingTable) -> "_Load":
        """Looks all users up at once: an unknown one is an error before the first step."""
        users, user_of_row = np.unique(np.asarray(source.columns.user_ids), return_inverse=True)
        return cls(source, table.lookup([str(user) for user in users]), user_of_row.astype(np.int32))

    def __call__(self, example: _Example) -> dict[str, np.ndarray]:
        row, view = self.source[example.row], _FLIPPED if example.flipped else ""
        own = bool(row["banned"])
        banned = own if example.user is None else example.banned
        # SAGE's label rule for an unsafe prompt: users who ban it prefer the safe picture, the others the unsafe one.
        chosen, rejected = ("chosen", "rejected") if banned == own else ("rejected", "chosen")
        return {
            "chosen": row[f"moments_{chosen}{view}"],
            "rejected": row[f"moments_{rejected}{view}"],
            **{name: value for name, value in row.items() if is_prompt(name.removeprefix(SAFE))},
            "twin": np.asarray(row["twin"], np.bool_),
            "original_size": row["original_size"],
            "crop": row["crop"],
            "user": self.embeddings[self.user_of_row[example.row] if example.user is None else example.user],
            "banned": np.asarray(banned, np.bool_),
            "swapped": np.asarray(banned != own, np.bool_),
            "unsafe": np.asarray(row["kind"], np.bool_),
            "row": np.asarray(example.row, np.int32),
        }


class _Block(grain.MapDataset):
    """The examples of one process: its block of every `size` examples, as arrays over devices are split into blocks."""

    def __init__(self, parent: grain.MapDataset, size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self._rows, self._size = size // process_count, size
        self._first = process_index * self._rows
        whole, rest = divmod(len(parent), size)
        self._length = whole * self._rows + min(max(rest - self._first, 0), self._rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, self._rows)
        return self._parent[batch * self._size + self._first + row]

    def __str__(self) -> str:  # Grain shows it in errors
        return f"block of {self._rows} of {self._size}"


# --- the position


@dataclass(frozen=True, eq=False)
class _BatchesFrom:
    """Position in the global order → the batches of this process from there on."""

    examples: grain.MapDataset
    batch_size: int
    process_index: int
    process_count: int
    endless: bool
    drop_remainder: bool
    read_threads: int
    place: Place | None

    def __call__(self, position: int) -> grain.IterDataset:
        end, size = len(self.examples), self.batch_size
        if self.drop_remainder and not self.endless:
            # Every process must make the same number of batches, or the others would wait for it without end.
            end = position + (end - position) // size * size
        part = self.examples[position:end]
        if self.process_count > 1:
            part = _Block(part, size, self.process_index, self.process_count)
        part = part.batch(size // self.process_count, drop_remainder=self.drop_remainder)
        prefetch = _PREFETCH if self.read_threads else 0
        part = part.to_iter_dataset(grain.ReadOptions(num_threads=self.read_threads, prefetch_buffer_size=prefetch))
        if self.place is not None:
            part = ThreadPrefetchIterDataset(part.map(self.place), prefetch_buffer_size=2)
        return part


class _Batches(grain.IterDataset):
    """Batches from any position on.

    Args:
      batches: position → batches.
      batch_size: over all processes.
      length: of the global order.
    """

    def __init__(self, batches: Callable[[int], grain.IterDataset], batch_size: int, length: int):
        super().__init__()
        self._batches, self._batch_size, self._length = batches, batch_size, length

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self._batches, self._batch_size, self._length)

    def __str__(self) -> str:  # Grain shows it in errors
        return f"batches of {self._batch_size}"


class _BatchIterator(grain.DatasetIterator):
    """Counts the examples that all processes have taken; that count is its whole state."""

    def __init__(self, batches: Callable[[int], grain.IterDataset], batch_size: int, length: int):
        super().__init__()
        self._batches, self._batch_size, self._length = batches, batch_size, length
        self._position = 0
        self._iterator: Iterator | None = None

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self._batches(self._position))
        batch = next(self._iterator)
        self._position = min(self._position + self._batch_size, self._length)
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, as JSON values."""
        return {"examples": self._position}

    def set_state(self, state: Any) -> None:
        """Continues from the position that `get_state` gave.

        Raises:
          PSAError: it is no position of this data.
        """
        position = state.get("examples") if isinstance(state, dict) else None
        if not isinstance(position, int) or not 0 <= position <= self._length:
            raise PSAError(f"position in the data is {state!r}; it must count examples, 0 to {self._length}")
        self.close()
        self._position = position

    def close(self) -> None:
        """Stops the threads that read ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
