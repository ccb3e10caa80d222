"""Initial noise of a seed, equal to that of `psa-jax generate`, without JAX: Threefry-2x32 and normal numbers from it.

Source: Salmon et al. 2011 (Threefry); Giles 2010, "Approximating the erfinv function" (single precision).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from psa_jax.errors import PSAError
from psa_jax.seeds import seed_words

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA
# Polynomials in w − 2.5 for w = −ln(1 − x²) below 5, and in √w − 3 otherwise; highest power first.
_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal latents for `latents=` of a pipeline, which scales them for its scheduler.

    Args:
      seeds: 0 to 2^64 − 1, one a picture. Row i depends on seed i alone.
      shape: channels, height and width of one picture's latents: (4, 64, 64) for SD1.5 at 512 px.

    Returns:
      [seeds, channels, height, width] in float32 on the CPU.

    Raises:
      PSAError: no seed, a seed out of range, or an invalid shape.
    """
    if not len(seeds) or len(shape) != 3 or min(shape) < 1:
        raise PSAError(f"latents of shape {shape} for {len(seeds)} seeds: give seeds, and (channels, height, width)")
    channels, height, width = shape
    normals = [normal(seed_words(seed), height * width * channels) for seed in seeds]
    return torch.from_numpy(np.stack(normals).reshape(-1, height, width, channels)).permute(0, 3, 1, 2).contiguous()


def normal(key: tuple[int, int], count: int) -> np.ndarray:
    """Standard normal numbers [count] in float32, equal to those of `jax.random.normal` for this key."""
    index = np.arange(count, dtype=np.uint64)
    high, low = threefry(key, (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32))
    return np.float32(math.sqrt(2)) * erfinv(uniform(high ^ low))


def threefry(key: tuple[int, int], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds.

    Args:
      key: two words of 32 bits.
      x, y: counters, uint32 of one shape.

    Returns:
      Two random words, uint32, for each pair of counters.
    """
    words = [*key, key[0] ^ key[1] ^ _PARITY]
    keys = [np.array([word], np.uint32) for word in words]
    x, y = x + keys[0], y + keys[1]
    for step in range(5):
        for turn in _ROTATIONS[step % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x, y = x + keys[(step + 1) % 3], y + keys[(step + 2) % 3] + np.uint32(step + 1)
    return x, y


def uniform(bits: np.ndarray) -> np.ndarray:
    """Uniform numbers in (−1, 1) in float32 from random words, whose upper 23 bits become the mantissa."""
    share = ((bits >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    low = np.nextafter(np.float32(-1), np.float32(0))
    return np.maximum(low, share * (np.float32(1) - low) + low)


def erfinv(x: np.ndarray) -> np.ndarray:
    """Inverse error function in float32, with XLA's order of operations, which decides the rounding near ±1."""
    w = -np.log1p(-x * x)
    centre = w < 5
    near, far = w - np.float32(2.5), np.sqrt(w) - np.float32(3)
    return x * np.where(centre, _polynomial(_CENTRE, near), _polynomial(_TAIL, far))


def _polynomial(coefficients: Sequence[float], at: np.ndarray) -> np.ndarray:
    total = np.full_like(at, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * at + np.float32(coefficient)
    return total
