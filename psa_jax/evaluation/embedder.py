"""What gives embeddings of pictures, and batches of one size, so that a program compiles once."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

BATCH = 16


@runtime_checkable
class Embedder(Protocol):
    """A model that gives embeddings of pictures.

    Attributes:
      weights: a text that says everything that embeddings depend on: a hash of the weights, and how pictures are
        prepared.
      width: of an embedding.
    """

    weights: str
    width: int

    def pictures(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n d"]:
        """Embeddings of n RGB pictures of any size, in float64."""
        ...


def in_batches(function: Callable[[jax.Array], jax.Array], rows: np.ndarray) -> np.ndarray:
    """`function` of all rows, `BATCH` of them at a time, in float64; the last batch is filled up with its first row."""
    parts = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        whole = np.concatenate([part, np.repeat(part[:1], BATCH - len(part), axis=0)])
        parts.append(np.asarray(function(jnp.asarray(whole)))[: len(part)])
    return np.concatenate(parts).astype(np.float64)
