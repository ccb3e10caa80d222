"""Seeds: every one draws something of its own, or is refused.

Noise of pictures takes 0 to 2^64 − 1, as torch's pipelines and their user interfaces do; everything else, whose
generators are fed one word, 0 to 2^32 − 1.
"""

from numbers import Integral

from psa_jax.errors import PSAError

PICTURE_BITS = 64


def check_seed(seed: object, what: str = "seed", bits: int = 32) -> int:
    """The seed as it was given.

    Raises:
      PSAError: no whole number from 0 to 2^bits − 1.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)  # Integral: also numpy's
    if not whole or not 0 <= seed < 1 << bits:
        raise PSAError(f"{what} is {seed!r}; give a whole number from 0 to {(1 << bits) - 1} (2^{bits} - 1)")
    return int(seed)


def seed_words(seed: object) -> tuple[int, int]:
    """The key (upper, lower 32 bits) of a picture's noise: what JAX makes of the seed where its integers have 64 bits.

    With 32 bits, as everywhere here, `jax.random.key` keeps the lower word alone: below 2^32 that is the same key.

    Raises:
      PSAError: as `check_seed`.
    """
    number = check_seed(seed, bits=PICTURE_BITS)
    return number >> 32, number & 0xFFFFFFFF
