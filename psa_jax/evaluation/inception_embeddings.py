"""Features of pictures by FID's Inception-v3, prepared as clean-fid does: what its `mode="clean"` gives."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from psa_jax.evaluation.embedder import in_batches
from psa_jax.interop.inception_file import load_inception
from psa_jax.models.inception import FEATURES, SIDE

_PREPARED = f"resized to {SIDE} x {SIDE} by Pillow's bicubic filter in float32, clipped to 0 to 255, (x - 128) / 128"


class InceptionEmbeddings:
    """FID's Inception-v3 of a local file.

    Args:
      file: as `load_inception` takes it.

    Attributes:
      weights: sha256 of the file, and how pictures are prepared.
      width: of the features.

    Raises:
      PSAError: not such a file.
    """

    width = FEATURES

    def __init__(self, file: Path):
        loaded = load_inception(file)
        self.weights = f"{loaded.weights}, {_PREPARED}"
        graph, self._params = nnx.split(loaded.model)
        self._run = jax.jit(lambda params, pixels: nnx.merge(graph, params)(pixels))

    def pictures(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n 2048"]:
        """Features of n pictures of any size."""
        pixels = np.stack([clean_pixels(each) for each in pictures])
        return in_batches(lambda part: self._run(self._params, part), pixels)


def clean_pixels(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "s s 3"]:
    """The network's input: a picture resized channel by channel without rounding to bytes, and scaled to -1 to 1.

    Pillow averages over all pixels when it shrinks, which the resizing inside TensorFlow's and pytorch-fid's FID does
    not.

    Source: G. Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation (2022).
    """
    channels = [
        np.asarray(
            Image.fromarray(picture[..., index].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )
        for index in range(3)
    ]
    # Bicubic filters overshoot at edges.
    return (np.stack(channels, axis=-1).clip(0.0, 255.0) - np.float32(128.0)) / np.float32(128.0)
