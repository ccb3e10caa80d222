"""Embeddings of pictures and texts by a CLIP model."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from psa_jax.evaluation.embedder import in_batches
from psa_jax.interop.clip_folder import load_clip_text, load_clip_vision


class ClipEmbeddings:
    """A CLIP model of a local folder; each tower is loaded when it is first needed.

    Args:
      folder: in transformers' layout.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @functools.cached_property
    def _vision(self):
        loaded = load_clip_vision(self._folder)
        graph, params = nnx.split(loaded.model)
        return loaded, params, jax.jit(lambda params, pixels: nnx.merge(graph, params)(pixels))

    @functools.cached_property
    def _text(self):
        model, tokenizer = load_clip_text(self._folder)
        graph, params = nnx.split(model)
        run = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).projected)
        return model.config.max_position_embeddings, tokenizer, params, run

    @property
    def weights(self) -> str:
        """sha256 of the weights and settings."""
        return self._vision[0].weights

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self._vision[0].model.config.projection_dim

    def pictures(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n p"]:
        """Embeddings of n pictures of any size, of length 1."""
        loaded, params, run = self._vision
        pixels = loaded.processor(images=list(pictures), input_data_format="channels_last", return_tensors="np")
        return _unit(in_batches(lambda part: run(params, part), pixels["pixel_values"].transpose(0, 2, 3, 1)))

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        """Embeddings of n texts, of length 1; what is longer than the model reads is cut off, as CLIPScore does."""
        length, tokenizer, params, run = self._text
        ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"]
        return _unit(in_batches(lambda part: run(params, part), np.array(ids, np.int32)))


def _unit(rows: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
