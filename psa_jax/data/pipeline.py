"""Grain: shards to training batches, with a position that goes into the checkpoint.

    source → seed → shuffle → repeat → draw → [position :] → this process's block of every batch → map → batch → workers
    → device

What is drawn for an example: its user, and whether its pair is mirrored.
The position is the number of examples that all processes together have drawn: `iterator.get_state()` is a small dict
that JSON holds, the same in every process, so a run goes on with other numbers of processes and batch sizes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from jaxtyping import Bool, Float32, Int, Int32

from psa_jax.data.shards import RowColumns
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.seeds import check_seed

Place = Callable[[dict[str, np.ndarray]], dict[str, Any]]
"""A batch of this process to where the training step wants it."""

BALANCES = ("users", "rows", "none")
_FLIPPED = "_flipped"


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows, as `shards.Shards`."""

    columns: RowColumns

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


def balanced_order(
    categories: Int[np.ndarray, " n"],
    unsafe: Bool[np.ndarray, " n"],
    banned: Bool[np.ndarray, " n"],
    safe_share: float = 0.3,
    seed: int = 0,
) -> Int[np.ndarray, " m"]:
    """Row numbers, some repeated, in which a category alone does not tell which picture is preferred (`"rows"`).

    In every category, unsafe-prompt rows of users who ban it and of users who allow it occur equally often: the rarer
    kind is repeated. Safe-prompt rows then make up `safe_share` of all (rounded to whole rows). No row is lost: where
    that share has no place for every safe row, the unsafe ones are repeated as a whole until it has. Inside one group
    the numbers of repetitions differ by at most one. With safe_share = 0 there are no safe rows.

    Args:
      categories: category number of each row.
      unsafe: True for an unsafe prompt.
      banned: whether the row's user bans the category.
      safe_share: in [0, 1).
      seed: decides which rows get the extra repetition, and the order.

    Raises:
      PSAError: a category that all users ban, or none, so that it cannot be balanced; no safe rows; a bad share.
    """
    rng = np.random.default_rng(seed)
    groups: list[tuple[np.ndarray, int]] = []
    for category in np.unique(categories[unsafe]).tolist():
        here = unsafe & (categories == category)
        bans, allows = np.flatnonzero(here & banned), np.flatnonzero(here & ~banned)
        _require_both(category, bans, allows)
        larger = max(bans.size, allows.size)
        groups += [(bans, larger), (allows, larger)]
    return _with_safe(groups, np.flatnonzero(~unsafe), safe_share, rng)


def mixed_order(unsafe: Bool[np.ndarray, " n"], safe_share: float = 0.3, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Row numbers, some repeated, of which `safe_share` have safe prompts (`"users"`); no row is lost.

    Args:
      unsafe, safe_share, seed: as in `balanced_order`.

    Raises:
      PSAError: no unsafe or no safe rows, or a bad share.
    """
    rows = np.flatnonzero(unsafe)
    return _with_safe([(rows, rows.size)], np.flatnonzero(~unsafe), safe_share, np.random.default_rng(seed))


def _with_safe(
    groups: list[tuple[np.ndarray, int]], safe: np.ndarray, safe_share: float, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Groups of unsafe rows, each stretched to its number of places, and safe rows for their share of all."""
    if not 0 <= safe_share < 1:
        raise PSAError(f"share of safe prompts is {safe_share}; give a number from 0 to below 1")
    unsafe = sum(count for _, count in groups)
    if not unsafe:
        raise PSAError("cannot balance: there are no rows with unsafe prompts; set data.balance to none")
    ratio = safe_share / (1 - safe_share)  # safe rows for each unsafe one
    if safe_share:
        if not safe.size:
            raise PSAError("cannot balance: there are no rows with safe prompts; set data.safe_share to 0")
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
    balance: str = "users",
    safe_share: float = 0.3,
    flips: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    read_threads: int = 4,
    prefetch: int = 4,
    workers: int = 0,
    place: Place | None = None,
) -> grain.IterDataset:
    """Batches of one process: its block of each batch. The blocks of all processes in order are the batch of one.

    A batch is a dict of arrays, b = batch_size / process_count:
      chosen, rejected: [b, h, w, 2c] float16 VAE moments (mean, log-variance); the training step makes them float32.
      input_ids (input_ids_2, …): [b, t] int32.
      text_states, text_pooled: [b, t, c] and [b, p] float16, where the shards have them.
      original_size, crop: [b, 2] int32, in pixels, as SDXL is told (of the picture before mirroring).
      user: [b, D] float32 embedding.
      banned: [b] bool, whether that user bans the category.
      swapped: [b] bool, whether the row's own rejected picture is the chosen one of that user.
      unsafe: [b] bool, whether the prompt is the unsafe one.
      category: [b] int32, position in CATEGORIES.
      row: [b] int32, row of the split, for error reports.

    Args:
      source: rows, such as `open_shards(…)`.
      table: embeddings of all users in it.
      batch_size: over all processes.
      seed: of shuffling, balancing, drawing users and flipping.
      balance: "users": every unsafe prompt meets a user of this split drawn anew, who bans its category half the time,
        and prefers what SAGE's label rule says. "rows": every row keeps its user; rows are repeated as
        `balanced_order` says. "none": every row as it is, once an epoch.
      safe_share: of all rows, unless balance is "none".
      flips: mirror both pictures of every other pair, drawn anew each epoch.
      process_index, process_count: which block of every batch.
      num_epochs: None repeats without end.
      shuffle: draw a new order every epoch.
      drop_remainder: drop the incomplete batch at the very end (for evaluation keep it).
      read_threads: threads that read and assemble batches; 0 does it in the caller's.
      prefetch: batches made ahead.
      workers: processes that read and assemble batches, each with those threads; 0 does it in this one.
      place: moves a batch to its devices, in a thread of its own and two batches ahead; see `to_devices`.

    Raises:
      PSAError: a batch that cannot be divided, a user who is not in the table, data that cannot be balanced, or
        flips of shards that have none.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise PSAError(f"process {process_index} of {process_count} does not exist; count from 0")
    if batch_size < 1 or batch_size % process_count:
        raise PSAError(f"batch size {batch_size} cannot be divided among {process_count} processes; use a multiple")
    check_seed(seed)
    if flips and f"moments_chosen{_FLIPPED}" not in source[0]:
        raise PSAError("the shards hold no mirrored pictures; build them with --flips or train without")
    columns = source.columns
    if balance == "users":
        order = mixed_order(columns.unsafe, safe_share, seed)
    elif balance == "rows":
        order = balanced_order(columns.categories, columns.unsafe, columns.banned, safe_share, seed)
    elif balance == "none":
        order = np.arange(len(source))
    else:
        raise PSAError(f"balance is {balance!r}; use one of {', '.join(BALANCES)}")
    if num_epochs is not None and drop_remainder and len(order) * num_epochs < batch_size:
        raise PSAError(f"{len(order)} rows do not fill one batch of {batch_size}; use a smaller batch or more data")
    dataset = grain.MapDataset.source(_Order(order)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # Drawn here, where the position in the global order is the key: the same whatever the slices are.
    draw = _Draw(flips, _UserSampler.of(columns) if balance == "users" else None)
    examples = dataset.repeat(num_epochs).random_map(draw).map(_Load.of(source, table))

    def batches(position: int) -> grain.IterDataset:
        # Every process must draw the same number of batches, or the others would wait for it for ever.
        end = len(examples)
        if num_epochs is not None and drop_remainder:
            end = position + (end - position) // batch_size * batch_size
        part = examples[position:end]
        if process_count > 1:
            part = _Block(part, batch_size, process_index, process_count)
        part = part.batch(batch_size // process_count, drop_remainder=drop_remainder)
        options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch if read_threads else 0)
        part = part.to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which nothing here parses
                flags.FLAGS.mark_as_parsed()
            part = part.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        if place is not None:
            part = ThreadPrefetchIterDataset(part.map(place), prefetch_buffer_size=2)
        return part

    return _Batches(batches, batch_size, len(examples))


def to_devices(sharding: jax.sharding.Sharding, names: tuple[str, ...]) -> Place:
    """Each process's rows as its part of arrays over all devices.

    Args:
      names: what of a batch the training step takes.
    """

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in names}

    return place


class _Block(grain.MapDataset):
    """Of every `size` examples those of one process: one block, since arrays over devices are split into blocks."""

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


class _Batches(grain.IterDataset):
    """Batches from any position on.

    Args:
      batches: position in the global order → the batches of this process from there on.
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
    """Counts the examples that all processes have drawn; that count is its whole state."""

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
        return {"examples": self._position}

    def set_state(self, state: Any) -> None:
        position = state.get("examples") if isinstance(state, dict) else None
        if not isinstance(position, int) or not 0 <= position <= self._length:
            raise PSAError(f"position in the data is {state!r}; it must count examples, 0 to {self._length}")
        self.close()
        self._position = position

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class _Example(NamedTuple):
    """Which row comes, for whom, and whether mirrored."""

    row: int
    asker: int | None  # number of a user drawn anew; None: the row's own
    banned: bool  # whether that user bans the category
    flipped: bool


@dataclass(frozen=True, eq=False)
class _UserSampler:
    """Who may ask for what: for each category the numbers of the users who allow and who ban it.

    Args:
      of_category: category → (users who allow it, users who ban it).
      rows: facts about the rows.
    """

    of_category: Mapping[int, tuple[np.ndarray, np.ndarray]]
    rows: RowColumns

    @classmethod
    def of(cls, columns: RowColumns) -> "_UserSampler":
        """Raises PSAError for a category that all users ban, or none."""
        numbers = np.unique(np.asarray(columns.user_ids), return_inverse=True)[1]
        found = {}
        for category in np.unique(columns.categories[columns.unsafe]).tolist():
            here = columns.categories == category
            allow, ban = (np.unique(numbers[here & (columns.banned == banned)]) for banned in (False, True))
            _require_both(category, ban, allow)
            found[category] = allow, ban
        return cls(found, columns)

    def draw(self, row: int, rng: np.random.Generator) -> tuple[int, bool]:
        banned = bool(rng.integers(2))
        return int(rng.choice(self.of_category[int(self.rows.categories[row])][banned])), banned


@dataclass(frozen=True, eq=False)
class _Draw:
    """Row number to example."""

    flips: bool
    askers: _UserSampler | None

    def __call__(self, row: int, rng: np.random.Generator) -> _Example:
        flipped = self.flips and bool(rng.integers(2))
        if self.askers is None or not self.askers.rows.unsafe[row]:
            return _Example(row, None, False, flipped)
        return _Example(row, *self.askers.draw(row, rng), flipped)


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
    """Example to one element of a batch."""

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
        banned = own if example.asker is None else example.banned
        # An unsafe prompt: who bans it prefers the safe picture, who does not the unsafe one (SAGE's label rule).
        chosen, rejected = ("chosen", "rejected") if banned == own else ("rejected", "chosen")
        return {
            "chosen": row[f"moments_{chosen}{view}"],
            "rejected": row[f"moments_{rejected}{view}"],
            **{name: value for name, value in row.items() if name.startswith(("input_ids", "text_"))},
            "original_size": row["original_size"],
            "crop": row["crop"],
            "user": self.embeddings[self.user_of_row[example.row] if example.asker is None else example.asker],
            "banned": np.asarray(banned, np.bool_),
            "swapped": np.asarray(banned != own, np.bool_),
            "unsafe": np.asarray(row["kind"], np.bool_),
            "category": np.asarray(row["category"], np.int32),
            "row": np.asarray(example.row, np.int32),
        }


def _require_both(category: int, bans: np.ndarray, allows: np.ndarray) -> None:
    if not bans.size or not allows.size:
        who = "bans" if not bans.size else "allows"
        raise PSAError(
            f"cannot balance: no user here {who} {CATEGORIES[category]}; add users or set data.balance to none"
        )


def _stretch(rows: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """`count` of `rows`, each as often as every other or once more."""
    times, extra = divmod(count, rows.size)
    return np.concatenate([np.tile(rows, times), rng.choice(rows, extra, replace=False)])
