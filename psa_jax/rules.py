"""Rules for the values of flags and configuration keys. Imports nothing heavy."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "float16")
"""Types that a base model can be computed in."""


class Rule(NamedTuple):
    """A rule for a value.

    Attributes:
      holds: whether a value obeys the rule.
      wanted: the rule in words that follow "give", such as "a whole number from 0 to 9".
    """

    holds: Callable[[Any], bool]
    wanted: str


def quoted(value: Any, most: int = 80) -> str:
    """Formats a value for an error: its `repr`, cut after `most` characters."""
    # Python refuses to print very large integers in decimal.
    text = hex(value) if type(value) is int and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def whole(low: int, high: int) -> Rule:
    """Rule for whole numbers from `low` to `high`; booleans do not count as numbers."""
    return Rule(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Rule for finite numbers.

    Args:
      low: least value.
      high: greatest value.
      above: excludes `low`.
      below: excludes `high`.
    """

    def holds(value: Any) -> bool:
        # Not math.isfinite, which raises for integers beyond the range of a float.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    least = "" if low == -math.inf else f" above {low:g}" if above else f" of {low:g} or more"
    most = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
    return Rule(holds, f"a finite number{least}{most}")


def any_of(choices: Iterable[str]) -> Rule:
    """Rule for one of several words."""
    known = tuple(choices)
    return Rule(lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}")


def optional(rule: Rule) -> Rule:
    """Rule for None or a value that obeys another rule."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.wanted}, or none")


SEED, PICTURE_SEED = whole(0, 2**32 - 1), whole(0, 2**64 - 1)  # see psa_jax.seeds
_INT32 = 2**31 - 1  # largest index of arrays and loops
COUNT, COUNT_OR_NONE = whole(1, _INT32), whole(0, _INT32)
MOST_SIZE = 1 << 16
"""Largest side, thread count and the like: more is a typing error, and would exhaust memory."""
SIZE = whole(1, MOST_SIZE)
SHARE, DECAY = number(0.0, 1.0), number(0.0, 1.0, below=True)
RATE, WEIGHT, FINITE = number(above=True), number(), number(-math.inf)
