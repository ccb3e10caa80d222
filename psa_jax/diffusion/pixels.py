"""Conversion of pictures between bytes (0 to 255) and the model's pixels ([−1, 1])."""

from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, UInt8

from psa_jax.errors import PSAError

Pixels = TypeVar("Pixels", np.ndarray, Array)


def from_bytes(images: Pixels) -> Pixels:
    """Pixels in [−1, 1] in float32: byte/127.5 − 1.

    Args:
      images: bytes of any shape and integer type, in numpy or JAX.
    """
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_bytes(pixels: Float[np.ndarray, "*s"]) -> UInt8[np.ndarray, "*s"]:
    """Bytes of pixels in [−1, 1], clipped, and rounded as diffusers does.

    Raises:
      PSAError: a pixel is not finite. As a byte it would be black without a word.
    """
    if not np.isfinite(pixels).all():
        raise PSAError(
            "a picture is not finite and was not made: numbers went beyond their type while it was generated; use "
            "float32 (--dtype=float32), or a smaller --scale or --guidance"
        )
    return (np.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).round().astype(np.uint8)
