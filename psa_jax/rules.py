"""What a value may be: a predicate and the same in words, for flags and configurations alike. Imports nothing heavy."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be: a predicate, and the same in words."""

    holds: Callable[[Any], bool]
    wanted: str


def quoted(value: Any, most: int = 80) -> str:
    """A value as an error shows it: its `repr`, cut after `most` characters."""
    # Python writes no decimal digits of a whole number that is too large.
    text = hex(value) if type(value) is int and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`; true and false are none."""
    return Rule(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number from `low` to `high`, without the ends where `above` and `below` say so."""

    def holds(value: Any) -> bool:
        # Compared: math.isfinite cannot take a whole number beyond a float.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    least = "" if low == -math.inf else f" above {low:g}" if above else f" of {low:g} or more"
    most = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
    return Rule(holds, f"a finite number{least}{most}")


def any_of(choices: Iterable[str]) -> Rule:
    """One of some words."""
    known = tuple(choices)
    return Rule(lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}")


def optional(rule: Rule) -> Rule:
    """None, or what another rule wants."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.wanted}, or none")


SEED, PICTURE_SEED = whole(0, 2**32 - 1), whole(0, 2**64 - 1)  # psa_jax.seeds says why
_INT32 = 2**31 - 1  # what arrays and loops count with
COUNT, COUNT_OR_NONE = whole(1, _INT32), whole(0, _INT32)
MOST_SIZE = 1 << 16
"""What is more was mistyped, and would be an error of the system's or no memory left."""
SIZE = whole(1, MOST_SIZE)
SHARE, DECAY = number(0.0, 1.0), number(0.0, 1.0, below=True)
RATE, WEIGHT, FINITE = number(above=True), number(), number(-math.inf)
