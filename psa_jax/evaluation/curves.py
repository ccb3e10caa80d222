"""Learning curves: what belongs together in one drawing, as points for a page without scripts."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Float

from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.json_input import parse_json

TEMPLATES = Path(__file__).parents[1] / "assets"
Curve = dict[str, list[int | float]]
"""{"step": …, "value": …}, of equal lengths."""


class Panel(NamedTuple):
    """One drawing.

    Attributes:
      title: heading.
      meaning: what it shows, and what to wish for.
      level: where an untrained adapter stands; None for nowhere.
      series: label of each line → its metric.
      minor: whether a page that shows other things, too, may fold it away.
    """

    title: str
    meaning: str
    level: float | None
    series: Mapping[str, str]
    minor: bool = False


def _by_prompt(metric: str) -> dict[str, str]:
    """Lines of all pairs, of each kind of prompt, and of held-out pairs."""
    kinds = {kind: f"{metric}_{kind}" for kind in ("banned", "allowed", "safe")}
    return {"all": metric, **kinds, "held out": f"held_out_{metric}"}


PANELS = (
    Panel("Loss", "What training minimises.", None, {"training": "loss", "held out": "held_out_loss"}),
    Panel(
        "Swap learnt",
        "Banned: how far predictions have moved from the base model's to those for the safe prompt; 1 is all of it. "
        "Allowed and safe: 1 is no change.",
        1.0,
        {
            **{kind: f"swap_learnt_{kind}" for kind in ("banned", "allowed", "safe")},
            "banned, held out": "held_out_swap_learnt_banned",
            "allowed, held out": "held_out_swap_learnt_allowed",
        },
    ),
    Panel(
        "Swap learnt of banned prompts, by noise",
        "From the quarter of the schedule with the least noise to that with the most.",
        1.0,
        {name: f"swap_learnt_banned{part}" for part, name in enumerate(("least", "less", "more", "most"))},
        minor=True,
    ),
    Panel(
        "Preference accuracy",
        "Share of pairs in which the user's choice gains on the other picture. If banned rises and allowed falls, the "
        "adapter learns one taste for all users.",
        0.5,
        _by_prompt("accuracy"),
    ),
    Panel(
        "Winner's error − base model's",
        "Below 0, the adapter draws the chosen pictures better than the base model does. Above 0 it unlearns them.",
        0.0,
        _by_prompt("winner_gap"),
    ),
    Panel(
        "Loser's error − base model's",
        "Above 0, the adapter draws the rejected pictures worse than the base model does.",
        0.0,
        _by_prompt("loser_gap"),
        minor=True,
    ),
    Panel(
        "Margin",
        "By how much the user's choice is preferred, in units of the loss's logit.",
        0.0,
        _by_prompt("margin"),
        minor=True,
    ),
    Panel(
        "Colour drift",
        "How far the mean colour moves from the base model's; wanted flat.",
        0.0,
        {"all": "colour_drift"},
        minor=True,
    ),
    Panel("Gradient norm", "Before clipping.", None, {"gradient": "gradient_norm"}, minor=True),
    Panel("Learning rate", "", None, {"rate": "learning_rate"}, minor=True),
    Panel("Pairs a second", "Without compiling, saving and judging.", None, {"pairs": "pairs_per_second"}, minor=True),
)
"""The drawings in their order; those without any of their metrics are left out."""

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38
"""Size of a drawing and its margins, in SVG units; the labels of the axes are in the margins."""
_LARGEST = 1e30
"""Values beyond it, and those that are not finite, are not drawn."""
_BANDS = 50
"""Steps of a drawing that say the values of its lines under the pointer."""


def panels_of(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """What the template draws of a run's metrics.

    Args:
      curves: metric → its curve; one that is in none of PANELS has a drawing of its own.

    Raises:
      PSAError: an empty curve, steps and values of different lengths, or a value that is not finite.
    """
    known = {metric for panel in PANELS for metric in panel.series.values()}
    own = [Panel(name.replace("_", " "), "", None, {name: name}) for name in curves if name not in known]
    return [drawing(panel, curves) for panel in (*PANELS, *own) if any(m in curves for m in panel.series.values())]


def curves_of(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] | None = None) -> dict[str, Curve]:
    """Curves of the rows of a metrics.jsonl.

    Args:
      rows: each with its step; a row may lack a metric, and a value that is not finite is left out.
      metrics: those to take; None for those of PANELS.
    """
    metrics = [metric for panel in PANELS for metric in panel.series.values()] if metrics is None else metrics
    found = {}
    for name in metrics:
        having = [row for row in rows if abs(row.get(name, math.inf)) < _LARGEST]  # NaN is not
        if having:
            found[name] = {"step": [row["step"] for row in having], "value": [row[name] for row in having]}
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; half a row at the end, of a run that is writing, is left out.

    Raises:
      PSAError: no such file, or a line that is no row.
    """
    if not path.is_file():
        raise PSAError(f"{path}: no such file; give the --workdir of a run of psa-jax train")
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise PSAError(f"{path}: no text in UTF-8, so no metrics of a run") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            row = parse_json(line, f"{path}, line {number}", constants=True)
            if type(row.get("step")) is not int or not all(type(value) in (int, float) for value in row.values()):
                raise PSAError(f"{path}, line {number}: no row of metrics; remove the line")
            rows.append(row)
    if not rows:
        raise PSAError(f"{path}: no row yet; the first comes after log_every steps")
    return rows


def write_curves(path: Path, curves: Mapping[str, Curve], facts: Mapping[str, str]) -> None:
    """Writes the page of a run, completely or not at all.

    Args:
      path: the HTML file, in an existing folder.
      curves: metric → its curve.
      facts: name → what to say above the drawings.

    Raises:
      PSAError: as `panels_of`, or nothing to draw.
    """
    if not curves:
        raise PSAError(f"{path}: the run has no finite metric to draw; see its metrics.jsonl")
    write(path, render("curves.html.j2", panels=panels_of(curves), facts=facts))


def render(template: str, **values: Any) -> str:
    """Fills in a template of this package; text from outside is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def drawing(panel: Panel, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """One panel for the template: points of the raw and the smoothed lines, ticks and texts.

    Args:
      panel: with at least one series that has a curve.
      curves: by the names that the panel's series give.
    """
    lines = {label: _checked(metric, curves[metric]) for label, metric in panel.series.items() if metric in curves}
    steps, values = (np.concatenate([line[axis] for line in lines.values()]) for axis in (0, 1))
    reach = values if panel.level is None else np.append(values, panel.level)
    y_ticks, x_ticks = round_ticks(reach.min(), reach.max()), round_ticks(min(0.0, steps.min()), steps.max())
    # The lines end at the right edge, wherever the next round step would be.
    span = steps.max() - x_ticks[0] or 1.0

    def to_x(step: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - x_ticks[0]) / span

    def to_y(value: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    def line(label: str, step: np.ndarray, value: np.ndarray) -> dict[str, Any]:
        window = _window(len(value))
        smooth = _moving_mean(value, window)
        x, y = to_x(step), to_y(smooth)
        return {
            "label": label,
            "window": window,
            "points": _points(x, to_y(value)),
            "smooth": _points(x, y),
            "last": f"{smooth[-1]:.3g}".replace("-", "−"),
            "last_at": (float(x[-1]), float(y[-1])),
            "at": (step, smooth, x, y),
        }

    drawn = [line(label, *each) for label, each in lines.items()]
    return {
        "title": panel.title,
        "meaning": panel.meaning,
        "minor": panel.minor,
        "lines": drawn,
        "bands": _bands([each.pop("at") for each in drawn], to_x),
        "level": None if panel.level is None else float(to_y(np.array([panel.level]))[0]),
        "y_ticks": [(float(to_y(np.array([tick]))[0]), tick_text(tick, y_ticks)) for tick in y_ticks],
        "x_ticks": [
            (float(to_x(np.array([tick]))[0]), tick_text(tick, x_ticks)) for tick in x_ticks if tick <= steps.max()
        ],
        "steps": f"{steps.max():.0f}",
        "box": dict(width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM),
    }


def _bands(lines: Sequence[tuple[np.ndarray, ...]], to_x: Callable) -> list[dict[str, Any]]:
    """What a drawing says under the pointer: for some of its steps, the lines' values there.

    Args:
      lines: steps, values, places and heights of each line.
      to_x: step → place in the drawing.

    Returns:
      For each step: its text, its place `x`, the `start` and `end` of the places that say it, and what it `says`:
      number of the line, its place, height and text. A line without a value there says its latest one, if it has one.
    """
    steps = np.unique(np.concatenate([step for step, *_ in lines]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(_BANDS, len(steps))).astype(int))]
    x = to_x(steps)
    edges = np.concatenate([[0.0], (x[1:] + x[:-1]) / 2, [WIDTH]])
    bands = []
    for i, step in enumerate(steps):
        latest = [int(np.searchsorted(line[0], step, side="right")) - 1 for line in lines]
        says = [
            (number, float(places[last]), float(heights[last]), f"{values[last]:.4g}".replace("-", "−"))
            for number, (last, (_, values, places, heights)) in enumerate(zip(latest, lines, strict=True))
            if last >= 0
        ]
        bands.append(
            dict(step=f"{step:,.0f}", x=float(x[i]), start=float(edges[i]), end=float(edges[i + 1]), says=says)
        )
    return bands


def _checked(name: str, curve: Curve) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    step, value = (np.asarray(curve[key], np.float64) for key in ("step", "value"))
    if not len(step) or len(step) != len(value) or not np.isfinite([step, value]).all():
        raise PSAError(f"curve {name!r}: give as many steps as values, at least one, all finite")
    return step, value


def last_value(curve: Curve) -> float:
    """What a drawing says at the end of a line: the mean over the latest twentieth of its values."""
    values = curve["value"]
    return float(np.mean(values[-_window(len(values)) :]))


def _window(count: int) -> int:
    """Values that a smoothed line averages over, of a line of so many."""
    return max(1, count // 20)


def _moving_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean over the last `window` values; at the start, over all values so far."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def round_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose [low, high]."""
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [i * stride for i in range(first, last + 1)]


def tick_text(tick: float, ticks: list[float]) -> str:
    """A tick of `round_ticks` with as many digits as tell it from its neighbours."""
    stride = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(stride) + 1e-9))
    # A stride of 0.25 or 2.5 has one digit more than its size says.
    exact = math.isclose(stride * 10**digits, round(stride * 10**digits), rel_tol=1e-6)
    return number_text(tick, digits if exact else digits + 1)


def _points(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def number_text(value: int | float, digits: int) -> str:
    """A number with a real minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")
