"""Benchmark turns: implementations are measured alternately, so that a temporary disturbance meets all of them.

This does not help on a machine that is always busy, which slows implementations with waiting threads more than others.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from psa_jax.progress import Progress, print_on_main


def take_turns(ways: Mapping[str, Callable[[], float]], turns: int, *, rotate: bool = False) -> list[dict[str, float]]:
    """Runs implementations alternately: A B A B …

    Args:
      ways: implementations by name; each returns what it measured, such as seconds.
      turns: how often each runs.
      rotate: lets each be first equally often, A B B A …, for when an earlier run influences the next.

    Returns:
      For each turn, the measurement of each implementation.
    """
    names, found = list(ways), []
    with Progress(turns, "turn", f"measuring {', '.join(names)}") as progress:
        for turn in range(turns):
            first = turn % len(names) if rotate else 0
            found.append({name: ways[name]() for name in names[first:] + names[:first]})
            progress.step()
    return found


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median of the values as `name`, and their first and third quartile as `name_quartiles`."""
    low, high = (round(float(value), digits) for value in np.quantile(values, (0.25, 0.75)))
    return {name: round(statistics.median(values), digits), f"{name}_quartiles": [low, high]}


class Load:
    """Load of the machine around a measurement: create it before, call `summary` after."""

    def __init__(self) -> None:
        self._before = _load()

    def summary(self) -> dict[str, Any]:
        """Returns `load` before and after, `cores` and `busy`; prints a line if the machine is busy.

        This process needs one core before the measurement and all of them during it; a quarter of the cores more is
        tolerated. `load` and `busy` are None on a machine that does not report its load.
        """
        cores, before, after = os.cpu_count() or 1, self._before, _load()
        if before is None or after is None:
            return {"load": None, "cores": cores, "busy": None}
        busy = before > 1 + cores / 4 or after > cores + 1 + cores / 4
        if busy:
            print_on_main(
                f"the machine is busy: load {before:.1f} before measuring and {after:.1f} after it, on {cores} cores; "
                "measure again when it is idle: the load slows one implementation more than another"
            )
        return {"load": [round(before, 2), round(after, 2)], "cores": cores, "busy": busy}


def _load() -> float | None:
    """Average number of runnable processes over the last minute; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
