"""Work files of a long encoding, so that it can be interrupted, continued and shared among hosts.

Results are stored in chunks of a fixed number of items. A chunk is written completely or not at all. Its name is a hash
of everything that its content depends on, so that exactly what has changed is encoded again.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from psa_jax.errors import PSAError
from psa_jax.files import write_private
from psa_jax.progress import Progress

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Chunk:
    """Consecutive items and the file with their results.

    Args:
      path: the file.
      items: the numbers of the items.
    """

    path: Path
    items: range


def plan_chunks(folder: Path, settings: Mapping[str, Any], digests: Sequence[str], size: int) -> list[Chunk]:
    """Divides the items into chunks of `size`; the last one may be smaller.

    Args:
      folder: for the work files.
      settings: JSON values that all results depend on.
      digests: hash of each item.
      size: items in a chunk.
    """
    chunks = []
    for start in range(0, len(digests), size):
        items = range(start, min(start + size, len(digests)))
        key = hashlib.sha256(json.dumps([settings, digests[items.start : items.stop]], sort_keys=True).encode())
        chunks.append(Chunk(folder / f"{key.hexdigest()}.safetensors", items))
    return chunks


def fill_chunks(
    chunks: Sequence[Chunk],
    encode: Callable[[list[int]], Iterator[Mapping[str, np.ndarray]]],
    unit: str,
    part: tuple[int, int] = (0, 1),
    *,
    batch: int = 1,
) -> None:
    """Writes the missing chunks.

    Args:
      chunks: all chunks.
      encode: item numbers, ascending → the results of each item, in order. It is called once for all missing items, so
        that reading ahead does not stop at the end of a chunk.
      unit: the word for an item, in the singular, for the progress bar.
      part: (i, n) writes only chunks i, i + n, i + 2n, …
      batch: number of results that arrive together, for the progress bar.

    Raises:
      PSAError: a file cannot be written.
    """
    missing = [chunk for chunk in chunks[part[0] :: part[1]] if not chunk.path.exists()]
    numbers = [number for chunk in missing for number in chunk.items]
    with Progress(len(numbers), unit, "encoding") as progress:

        def counted() -> Iterator[Mapping[str, np.ndarray]]:
            for number, result in enumerate(encode(numbers), 1):
                if number % batch == 0 or number == len(numbers):
                    progress.step((number - 1) % batch + 1)
                yield result

        results = counted()
        for chunk in missing:
            rows = list(islice(results, len(chunk.items)))
            write_private(chunk.path, save({name: np.stack([row[name] for row in rows]) for name in rows[0]}))


class Encoded(Sequence[dict[str, np.ndarray]]):
    """The results of all items, by item number, read from disk on demand.

    Args:
      chunks: all chunks, complete.

    Raises:
      PSAError: a work file cannot be read.
    """

    def __init__(self, chunks: Sequence[Chunk]):
        self._size, self._length = len(chunks[0].items), chunks[-1].items.stop
        self._files = []
        for chunk in chunks:
            try:
                self._files.append(safe_open(chunk.path, framework="np"))
            except (OSError, SafetensorError) as error:
                raise PSAError(f"{chunk.path}: work file cannot be read ({error}); remove it and run again") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        if not 0 <= item < self._length:
            raise IndexError(item)  # ends an iteration
        chunk, row = divmod(item, self._size)
        file = self._files[chunk]
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (not a mapping)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """`map` in threads, in order.

    Args:
      threads: their number.
      ahead: the most results that may wait to be taken.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
