"""Seeds of random numbers: two different seeds never give the same numbers.

Seeds of pictures are 0 to 2^64 − 1, as in torch's pipelines and their user interfaces. All other seeds are 0 to
2^32 − 1, because their generators take one 32-bit word.
"""

from numbers import Integral

from psa_jax.errors import PSAError

PICTURE_BITS = 64


def check_seed(seed: object, what: str = "seed", bits: int = 32) -> int:
    """Checks a seed and returns it as an int.

    Args:
      seed: a whole number of Python or numpy.
      what: its name, for the error.
      bits: size of the allowed range.

    Raises:
      PSAError: it is no whole number from 0 to 2^bits − 1.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 1 << bits:
        raise PSAError(f"{what} is {seed!r}; give a whole number from 0 to {(1 << bits) - 1} (2^{bits} - 1)")
    return int(seed)


def seed_words(seed: object) -> tuple[int, int]:
    """Splits a picture's seed into the two words of a JAX key: the upper and the lower 32 bits.

    This is the key that `jax.random.key` makes of the seed with 64-bit integers. Without them, as here, it would
    keep only the lower word; for seeds below 2^32 the keys are equal.

    Raises:
      PSAError: the seed is no whole number from 0 to 2^64 − 1.
    """
    number = check_seed(seed, bits=PICTURE_BITS)
    return number >> 32, number & 0xFFFFFFFF
