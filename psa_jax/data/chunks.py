"""Work files of a long encoding, so that it can be stopped at any moment, shared among hosts and gone on with.

Results lie in chunks of a fixed number of items. A chunk is written whole or not at all, under a name that is a hash
of everything its content depends on: what has changed since is encoded again, what has not is not.
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
    """Some consecutive items and the file of their results."""

    path: Path
    items: range


def plan_chunks(folder: Path, settings: Mapping[str, Any], digests: Sequence[str], size: int) -> list[Chunk]:
    """Cuts the items into chunks of `size`; the last one may be smaller.

    Args:
      folder: of the work files.
      settings: JSON values that all results depend on.
      digests: hash of each item.
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
    """Writes the chunks that are missing.

    Args:
      encode: item numbers, ascending → the results of each, one after the other. It is called once, for all missing
        items, so that reading ahead does not stop at the end of a chunk.
      unit: what an item is, in the singular.
      part: (i, n) leaves all but chunks i, i + n, i + 2n, … to others.
      batch: so many results come at a time.
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
    """The results in chunks that are all there, by item number; read from disk on demand."""

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
            raise IndexError(item)  # it ends an iteration
        chunk, row = divmod(item, self._size)
        file = self._files[chunk]
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """`map` in threads, in order, with at most `ahead` results waiting."""
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
