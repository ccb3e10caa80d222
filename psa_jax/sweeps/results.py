"""What the points of a sweep measured: a row each, seeds of one setting aggregated, the best setting."""

import csv
import dataclasses
import difflib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psa_jax.errors import PSAError
from psa_jax.evaluation.curves import Curve, curves_of, last_value, read_rows
from psa_jax.evaluation.stats import mean_interval
from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.sweeps.plan import Overrides

SEED = "seed"
"""The key that tells trainings of one setting apart."""
_NO_RESULT = ("step", "time", "examples")


@dataclasses.dataclass(frozen=True)
class Result:
    """One point.

    Attributes:
      state: done, diverged, unfinished (metrics, but no adapter yet) or none.
      curves: metric → its curve.
      last: metric → where its curve ends, as `last_value`.
    """

    name: str
    overrides: Overrides
    state: str
    steps: int
    curves: Mapping[str, Curve]
    last: Mapping[str, float]


class Mean(NamedTuple):
    """A metric over seeds: its mean, half of its 95 % interval (None for one seed), and how many seeds have it."""

    mean: float
    half: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """Points that differ in their seed alone.

    Attributes:
      overrides: without the seed.
      results: of the points.
      means: metric → its mean over the points that have ended.
    """

    overrides: Overrides
    results: Sequence[Result]
    means: Mapping[str, Mean]

    @property
    def label(self) -> str:
        """Keys' ends and values."""
        return ", ".join(f"{key.rpartition('.')[2]} {text}" for key, text in self.overrides.items()) or "all seeds"

    @property
    def complete(self) -> bool:
        """Whether all of its points have ended well."""
        return all(result.state == "done" for result in self.results)


def read_result(workdir: Path, name: str, overrides: Overrides) -> Result:
    """Reads a point's folder.

    Raises:
      PSAError: metrics that cannot be read.
    """
    folder, rows = workdir / name, []
    path = folder / "metrics.jsonl"
    if path.is_file() and b"\n" in path.read_bytes():
        rows = read_rows(path)
    metrics = sorted({key for row in rows for key in row} - set(_NO_RESULT))
    curves = curves_of(rows, metrics)
    state = "done" if (folder / ADAPTER_FILE).is_file() else "unfinished" if rows else "none"
    if state != "done" and any(folder.glob("nonfinite_*.json")):
        state = "diverged"
    last = {metric: last_value(curve) for metric, curve in curves.items()}
    return Result(name, overrides, state, int(rows[-1]["step"]) if rows else 0, curves, last)


def settings_of(results: Sequence[Result]) -> list[Setting]:
    """The settings in the order of their first points. A point that has not ended counts for no mean."""
    groups: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        key = tuple((key, text) for key, text in result.overrides.items() if key != SEED)
        groups.setdefault(key, []).append(result)
    return [Setting(dict(key), group, _means(group)) for key, group in groups.items()]


def _means(results: Sequence[Result]) -> dict[str, Mean]:
    found: dict[str, list[float]] = {}
    for result in results:
        if result.state == "done":
            for metric, value in result.last.items():
                found.setdefault(metric, []).append(value)
    return {metric: Mean(*mean_interval(values), len(values)) for metric, values in found.items()}


def require_metric(results: Sequence[Result], metric: str) -> None:
    """Raises PSAError where no point has a metric; it names those that are like it, or all."""
    known = sorted({name for result in results for name in result.last})
    if not known:
        raise PSAError("no point of the sweep has metrics yet; report it when its first has begun")
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise PSAError(f"--metric={metric}: no point has it; {hint}")


def direction(metric: str, best: str | None) -> str:
    """max or min: as asked for, or else min of what is a loss."""
    return best or ("min" if metric.endswith("loss") else "max")


def best_setting(settings: Sequence[Setting], metric: str, best: str) -> Setting | None:
    """The setting with the best mean, of those whose points have all ended well; None where there is none."""
    whole = [each for each in settings if each.complete and metric in each.means]
    sign = 1.0 if best == "max" else -1.0
    return max(whole, key=lambda each: sign * each.means[metric].mean, default=None)


def to_csv(results: Sequence[Result]) -> str:
    """A line for each point: its name, state, steps, what it changes, and where each metric ends."""
    keys = list(dict.fromkeys(key for result in results for key in result.overrides))
    metrics = sorted({metric for result in results for metric in result.last})
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["point", "state", "steps", *keys, *metrics])
    for result in results:
        changed = [result.overrides.get(key, "") for key in keys]
        measured = [result.last.get(metric, math.nan) for metric in metrics]
        values = ["" if math.isnan(value) else repr(value) for value in measured]
        lines.writerow([result.name, result.state, result.steps, *changed, *values])
    return text.getvalue()
