"""Preprocessing of pictures for the VAE: one resize and crop for both pictures of a pair."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from psa_jax.diffusion.pixels import from_bytes
from psa_jax.errors import PSAError

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,  # antialiased, as in torchvision
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Ways of resampling, by name."""


class Prepared(NamedTuple):
    """A picture ready for the VAE, with its original size and crop, which SDXL takes as conditions.

    Args:
      pixels: [r, r, 3] in [-1, 1].
      original_size: (height, width) of the file, in pixels.
      crop: (top, left) of the crop in the resized picture, in pixels.
    """

    pixels: Float32[np.ndarray, "r r 3"]
    original_size: tuple[int, int]
    crop: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side to `resolution`, then crops the centre.

    Nothing is random: the two pictures of a pair have one size, so they get the same crop.

    Args:
      resolution: side of the result, in pixels.
      resample: bilinear, bicubic or lanczos; all average over the source pixels when they shrink.

    Raises:
      PSAError: a resolution below 1 or another resampling.
    """

    resolution: int
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise PSAError(f"resolution is {self.resolution}; give a number of pixels from 1 up")
        if self.resample not in RESAMPLE:
            raise PSAError(f"resampling {self.resample!r} does not exist; use one of: {', '.join(RESAMPLE)}")

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """Prepares one picture."""
        height, width = image.shape[:2]
        short, side = min(height, width), self.resolution
        # Integer division, as torchvision's Resize: the longer side is rounded down.
        new_height, new_width = side * height // short, side * width // short
        resized = Image.fromarray(image).resize((new_width, new_height), RESAMPLE[self.resample])
        top, left = (new_height - side) // 2, (new_width - side) // 2
        pixels = np.asarray(resized)[top : top + side, left : left + side]
        return Prepared(from_bytes(pixels), (height, width), (top, left))
