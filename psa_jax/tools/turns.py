"""Ways that take turns, so that what disturbs for a while meets all of them, and how far to trust what comes out.

Turns do not help on a machine that is busy all the time: ways whose threads wait for each other lose more than others.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from psa_jax.progress import Progress, say


def take_turns(ways: Mapping[str, Callable[[], float]], turns: int, *, rotate: bool = False) -> list[dict[str, float]]:
    """What each way gives in each turn, such as its seconds: A B A B …

    Args:
      rotate: each way is the first of a turn as often as the others: A B B A …, where what ran before may matter.
    """
    names, found = list(ways), []
    with Progress(turns, "turn", f"measuring {', '.join(names)}") as progress:
        for turn in range(turns):
            first = turn % len(names) if rotate else 0
            found.append({name: ways[name]() for name in names[first:] + names[:first]})
            progress.step()
    return found


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """`name`, the median, and `name_quartiles`, between which half of the turns lie."""
    low, high = (round(float(value), digits) for value in np.quantile(values, (0.25, 0.75)))
    return {name: round(statistics.median(values), digits), f"{name}_quartiles": [low, high]}


class Load:
    """How many processes want to run, beside what is measured: made before that starts, asked when it has ended."""

    def __init__(self) -> None:
        self._before = _load()

    def told(self) -> dict[str, Any]:
        """`load` before and after, `cores` and `busy`; where the machine is busy, a line says so.

        Until the measuring starts this process needs one core, and while it lasts all of them. A quarter of the cores
        more is let pass. Of a machine that does not tell its load nothing is known: `load` and `busy` are None.
        """
        cores, before, after = os.cpu_count() or 1, self._before, _load()
        if before is None or after is None:
            return {"load": None, "cores": cores, "busy": None}
        busy = before > 1 + cores / 4 or after > cores + 1 + cores / 4
        if busy:
            say(
                f"the machine is busy: load {before:.1f} before measuring and {after:.1f} after it, on {cores} cores; "
                "measure again when it is idle: this slows one way more than another, and ratios say little"
            )
        return {"load": [round(before, 2), round(after, 2)], "cores": cores, "busy": busy}


def _load() -> float | None:
    """Over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
