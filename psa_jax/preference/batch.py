"""What a batch of preference pairs holds: the name, type and shape of each of its arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Shaped

from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.config import CLIPTextConfig
from psa_jax.prompt_columns import SAFE

Batch = dict[str, Shaped[jax.Array, "..."]]

# One for each text encoder of a base model: SDXL has two.
TOKENS = ("input_ids", "input_ids_2")
EMPTY_TOKENS = ("empty_ids", "empty_ids_2")

SIDE = "side"
"""Stands for the side of the latents in a column's shape."""


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def _ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape)


def _flags(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(2, size=shape)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(shape[0])


@dataclass(frozen=True)
class Column:
    """One array of a batch.

    Attributes:
      dtype: of its elements.
      shape: of one pair's entry, or of the whole array where all pairs share it; `SIDE` is the latents' side.
      values: makes random values of a shape.
    """

    dtype: Any
    shape: tuple[int | str, ...]
    values: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = _normal

    def sized(self, side: int) -> tuple[int, ...]:
        """The shape for latents of `side`."""
        return tuple(side if axis == SIDE else axis for axis in self.shape)


@dataclass(frozen=True)
class BatchSpec:
    """The arrays that a training step takes.

    Attributes:
      pair_columns: with a row for each pair.
      shared_columns: the same for all pairs.
      downscale: pixels of a picture to one latent, along a side.
    """

    pair_columns: dict[str, Column]
    shared_columns: dict[str, Column]
    downscale: int

    @classmethod
    def of_model(
        cls,
        model: StableDiffusion,
        user_dim: int,
        *,
        fixed_draws: bool = False,
        cached_text: bool = False,
        swap: bool = False,
    ) -> "BatchSpec":
        """The arrays for a base model, whose weights may be abstract.

        Args:
          model: decides on latents, tokens and, for SDXL, sizes and pooled text.
          user_dim: D of the profile embeddings.
          fixed_draws: whether each row has a few draws of its own, which are found by the number of the row.
          cached_text: whether text states are in the batch, in place of token ids.
          swap: whether the safe prompt of each pair is in the batch, for swap distillation.
        """
        moments = Column(np.float16, (SIDE, SIDE, 2 * model.vae.config.latent_channels))
        pairs = {
            "chosen": moments,
            "rejected": moments,
            "user": Column(np.float32, (user_dim,)),
            "banned": Column(np.bool_, (), _flags),
            "unsafe": Column(np.bool_, (), _flags),
        }
        text, shared = _text_columns(model) if cached_text else _token_columns(model)
        pairs |= text
        if swap:
            pairs |= {f"{SAFE}{name}": column for name, column in text.items()} | {"twin": Column(np.bool_, (), _ones)}
        if len(model.text_encoders) > 1:
            pairs |= {name: Column(np.int32, (2,), _zeros) for name in ("original_size", "crop")}
        if fixed_draws:
            pairs |= {"row": Column(np.int32, (), _numbers), "swapped": Column(np.bool_, (), _zeros)}
        return cls(pairs, shared, model.vae.config.downscale)

    def split(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays with a row for each pair, and those that all pairs share."""
        return tuple({name: batch[name] for name in columns} for columns in (self.pair_columns, self.shared_columns))

    def places(self, pairs: Any, shared: Any) -> dict[str, Any]:
        """For each array one of two values, such as where it lives."""
        return dict.fromkeys(self.pair_columns, pairs) | dict.fromkeys(self.shared_columns, shared)

    def abstract(
        self, count: int, resolution: int, places: dict[str, Sharding] | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch.

        Args:
          count: pairs.
          resolution: side of the pictures, in pixels.
          places: sharding of each array (`places`).
        """
        places = {} if places is None else places
        return {
            name: jax.ShapeDtypeStruct(shape, column.dtype, sharding=places.get(name))
            for name, (column, shape) in self._shapes(count, resolution).items()
        }

    def random(self, count: int, resolution: int, seed: int = 0) -> dict[str, np.ndarray]:
        """A batch of random values: for measuring time and memory, which do not depend on them."""
        rng = np.random.default_rng(seed)
        return {
            name: column.values(rng, shape).astype(column.dtype)
            for name, (column, shape) in self._shapes(count, resolution).items()
        }

    def _shapes(self, count: int, resolution: int) -> dict[str, tuple[Column, tuple[int, ...]]]:
        side = resolution // self.downscale
        pairs = {name: (column, (count, *column.sized(side))) for name, column in self.pair_columns.items()}
        return pairs | {name: (column, column.sized(side)) for name, column in self.shared_columns.items()}


def _token_columns(model: StableDiffusion) -> tuple[dict[str, Column], dict[str, Column]]:
    """Token ids of the prompts, and of the empty prompt, for each text encoder."""

    def column(config: CLIPTextConfig) -> Column:
        def ids(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return rng.integers(config.vocab_size, size=shape)

        return Column(np.int32, (config.max_position_embeddings,), ids)

    columns = [column(encoder.config) for encoder in model.text_encoders]
    return dict(zip(TOKENS, columns, strict=False)), dict(zip(EMPTY_TOKENS, columns, strict=False))


def _text_columns(model: StableDiffusion) -> tuple[dict[str, Column], dict[str, Column]]:
    """Text states of the prompts, and of the empty prompt; with a second encoder pooled text, too."""
    configs = [encoder.config for encoder in model.text_encoders]
    columns = {"states": Column(np.float16, (configs[0].max_position_embeddings, sum(c.hidden_size for c in configs)))}
    if len(configs) > 1:
        columns["pooled"] = Column(np.float16, (configs[-1].projection_dim,))
    return tuple({f"{whose}_{name}": column for name, column in columns.items()} for whose in ("text", "empty"))
