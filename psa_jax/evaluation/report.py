"""The report page: one self-contained HTML file with pictures, numbers and curves."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.evaluation.stats import selectivity_interval, wilson
from psa_jax.files import write

TEMPLATES = Path(__file__).parents[1] / "assets"

METHODS = {
    "psa": "PSA (this adapter)",
    "base": "Base model",
    "user_blind": "User-blind adapter",
    "published_t1": "Published adapter, 1 token",
}
"""Titles of the methods, in the order of the tables. Other methods come after these, under their own names."""

WAYS = {f"psa_{way}": f"PSA, unconditional side `{way}`" for way in ("off", "zeros", "same")}
"""Titles of the same adapter with another unconditional side; shown where they were measured."""

GROUP_TITLES = {
    "unseen": "Unseen users",
    "seen": "Users seen in training",
    "two": "Prompts that name two things, unseen users",
    "negated": "Prompts that say what is not there, unseen users",
    "unseen_bans": "Unseen users whose set of bans nobody in training has",
    "unseen_concepts": "Concepts that no training pair has, unseen users",
}
"""Group of cases → heading; those that a report lacks are left out."""

FULL_GROUPS = ("unseen", "seen")
"""Groups in which every method has a row, if only of dashes."""

RATES = {
    "selectivity": (
        "Selectivity",
        "Suppression + retention − 100. Any model that ignores the user gets 0; 100 is perfect.",
    ),
    "suppression": ("Suppression", "Prompts whose content this user bans: the picture does not show that content."),
    "retention": ("Retention", "The same kind of prompts where this user allows the content: the picture shows it."),
    "clean": ("Clean", "Of the suppressed pictures: a readable harmless picture stands there, not debris."),
    "benign_fidelity": ("Benign fidelity", "Harmless prompts: the picture shows the harmless thing they name."),
    "pass_rate": ("Pass rate", "Suppressed where banned, shown where allowed: over both kinds of prompts."),
}
"""Rate → (heading, meaning)."""

CURVES = {
    "loss": (
        "Loss",
        "What training minimises.",
        None,
    ),
    "swap_learnt_banned": (
        "Swap learnt, banned prompts",
        "How far predictions have moved from the base model's to its predictions for the safe prompt; 1 is all of it.",
        1.0,
    ),
    "swap_learnt_allowed": (
        "Swap learnt, allowed prompts",
        "1 is no change: what a user allows is drawn as the base model draws it.",
        1.0,
    ),
    "accuracy": ("Preference accuracy", "Share of pairs in which the user's choice gains on the other picture.", 0.5),
    "winner_gap": (
        "Winner's error − base model's",
        "Below 0, the adapter draws the chosen pictures better than the base model does.",
        0.0,
    ),
    "loser_gap": (
        "Loser's error − base model's",
        "Above 0, the adapter draws the rejected pictures worse than the base model does.",
        0.0,
    ),
    "margin": ("Margin", "By how much the user's choice is preferred, in units of the loss's logit.", 0.0),
}
"""Curve → (heading, meaning, level to compare it with)."""

Curve = dict[str, list[int | float]]
Rates = dict[str, int | float]

MARKERS = ("disc", "ring", "square", "triangle", "diamond")
SHOWN, DEBRIS = "shown", "debris"


@dataclass(frozen=True)
class Grid:
    """Pictures by prompt (row) and user (column).

    Attributes:
      users: column headings, such as "adult, bans nothing (L0)".
      prompts: row headings.
      banned: [row][column]: whether the user bans what the prompt asks for; None for the base model's column.
      pictures: bytes, RGB, row by row.
      verdicts: [row][column]: what the picture shows: "shown" (the content that the prompt asks for), "debris", or a
        word for something else, such as "replaced".
      reasons: [row][column]: why, in words, such as what the gate says; None where there is nothing to say.

    Raises:
      PSAError: the numbers of rows and columns differ.
    """

    users: list[str]
    prompts: list[str]
    banned: list[list[bool | None]]
    pictures: UInt8[np.ndarray, "n h w 3"]
    verdicts: list[list[str]]
    reasons: list[list[str]] | None = None

    def __post_init__(self) -> None:
        rows, columns = len(self.prompts), len(self.users)
        tables = {"banned": self.banned, "verdicts": self.verdicts}
        for name, table in (tables | ({"reasons": self.reasons} if self.reasons else {})).items():
            if [len(row) for row in table] != [columns] * rows:
                raise PSAError(f"picture grid: {name} must have {rows} rows (prompts) of {columns} columns (users)")
        if len(self.pictures) != rows * columns:
            raise PSAError(f"picture grid: {len(self.pictures)} pictures; {rows} prompts x {columns} users are needed")


def write_report(path: Path, report: dict[str, Any], grid: Grid, curves: dict[str, Curve], commands: list[str]) -> None:
    """Writes the page, completely or not at all.

    Args:
      path: the HTML file, in an existing folder.
      report: contents of report.json. It must have PSA's own rates; a missing comparison gets dashes.
      grid: pictures by prompt and user.
      curves: name → {"step": …, "value": …}, of equal lengths.
      commands: the commands that made the report, one for each line.

    Raises:
      PSAError: rates of PSA on unseen users are missing, a method lacks a rate, or a curve is empty or not finite.
    """
    if "psa" not in report.get("unseen", {}):
        raise PSAError(f"{path}: the report has no rates of psa on unseen users; evaluate it before writing the page")
    recorded = report.get("recorded", {})
    names = list(METHODS) + sorted({name for split in GROUP_TITLES for name in report.get(split, {})} - set(METHODS))
    # Methods of the same recorded run share a footnote.
    notes = {command: _footnote(i) for i, command in enumerate(dict.fromkeys(recorded.values()))}
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}
    splits = [
        {
            "title": title,
            **_counts(report[key]),
            # Harder groups are judged for fewer methods; dashes for the others would say nothing.
            "rows": [_row(key, m, report[key].get(m)) for m in names if m in report[key] or key in FULL_GROUPS],
        }
        for key, title in GROUP_TITLES.items()
        if key in report
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        splits=splits,
        headline=splits[0]["rows"][0]["rates"],
        rates=RATES,
        names={name: (METHODS | WAYS).get(name, name) for name in names},
        markers=markers,
        marks={name: notes[recorded[name]] for name in names if name in recorded},
        notes=[(m, [METHODS.get(n, n) for n in names if recorded.get(n) == c], c) for c, m in notes.items()],
        duels=_duels(report["unseen"]["psa"], names),
        plane=[_point(report["unseen"][name]) | {"method": name} for name in names if name in report["unseen"]],
        users=grid.users,
        has_base=any(None in row for row in grid.banned),
        grid=[
            {"prompt": prompt, "cells": [_cell(grid, row, column) for column in range(len(grid.users))]}
            for row, prompt in enumerate(grid.prompts)
        ],
        curves=[_curve(name, curve) for name, curve in curves.items()],
        commands=commands,
        versions=report.get("versions", {}),
        duration=_duration(report["seconds"]) if "seconds" in report else None,
    )
    write(path, page)


# --- numbers


def _row(split: str, method: str, rates: Rates | None) -> dict[str, Any]:
    """One method's rates in the order of RATES: {text, low, high}, all None if there are none."""
    if rates is None:
        empty = dict(text=None, low=None, high=None)
        return {"method": method, "rates": dict.fromkeys(RATES, empty)}
    needed = {*RATES, "n_banned", "n_allowed", "n_safe"}
    if missing := sorted(needed - rates.keys()):
        raise PSAError(f"report: {method} on {split} users lacks {', '.join(missing)}; evaluate it again")
    return {"method": method, "rates": {name: _rate(name, rates) for name in RATES}}


def _rate(name: str, rates: Rates) -> dict[str, str | None]:
    """A rate and its 95 % interval as text, in percent; None if there is no case."""
    banned, allowed = rates["n_banned"], rates["n_allowed"]
    suppressed = round(rates["suppression"] * banned / 100)
    if name == "selectivity":
        retained = round(rates["retention"] * allowed / 100)
        limits = selectivity_interval(suppressed, banned, retained, allowed) if banned and allowed else None
    else:
        n = {
            "suppression": banned,
            "retention": allowed,
            "clean": suppressed,
            "benign_fidelity": rates["n_safe"],
            "pass_rate": banned + allowed,
        }[name]
        limits = wilson(round(rates[name] * n / 100), n) if n else None
    if limits is None:
        return dict(text=None, low=None, high=None)
    low, high = (_number(100 * limit, 0) for limit in limits)
    return dict(text=_number(rates[name], 1), low=low, high=high)


def _number(value: int | float, digits: int) -> str:
    """With a real minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def _counts(methods: dict[str, Rates]) -> dict[str, Any]:
    """Number of cases of a split: that of its first method, since all methods have the same cases."""
    first = methods.get("psa") or next(iter(methods.values()), {})
    return {name: first.get(name) for name in ("n_banned", "n_allowed", "n_safe")}


def _duels(psa: Rates, names: Sequence[str]) -> list[dict[str, Any]]:
    """PSA against each other method: wins among the prompts on which exactly one of the two passes."""
    duels = []
    for name in names:
        if f"win_rate_vs_{name}" not in psa:
            continue
        win, tie = psa[f"win_rate_vs_{name}"], psa[f"tie_rate_vs_{name}"]
        unsafe = psa["n_banned"] + psa["n_allowed"]
        decided = unsafe - round(tie * unsafe / 100)
        low, high = wilson(round(win * decided / 100), decided) if decided else (None, None)
        duels.append(
            {
                "method": name,
                "win": _number(win, 1) if decided else None,
                "low": _number(100 * low, 0) if decided else None,
                "high": _number(100 * high, 0) if decided else None,
                "tie": _number(tie, 1),
                "decided": decided,
                "shares": [(100 - tie) * win / 100, tie, (100 - tie) * (100 - win) / 100],
            }
        )
    return duels


def _point(rates: Rates) -> Rates:
    """A method's point in the plane of suppression and retention, with its intervals, in percent."""
    point = {"x": rates["suppression"], "y": rates["retention"]}
    for axis, name, n in (("x", "suppression", rates["n_banned"]), ("y", "retention", rates["n_allowed"])):
        limits = wilson(round(rates[name] * n / 100), n) if n else (0.0, 1.0)
        point[axis + "0"], point[axis + "1"] = (100 * limit for limit in limits)
    return point


def _duration(seconds: int | float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _footnote(index: int) -> str:
    return ("†", "‡", "§", "¶")[index % 4] * (1 + index // 4)


# --- pictures


def _cell(grid: Grid, row: int, column: int) -> dict[str, Any]:
    banned, verdict = grid.banned[row][column], grid.verdicts[row][column]
    return {
        "source": _png(grid.pictures[row * len(grid.users) + column]),
        "verdict": verdict,
        "kind": "base" if banned is None else "banned" if banned else "allowed",
        "outcome": _outcome(banned, verdict),
        "reason": grid.reasons[row][column] if grid.reasons else "",
    }


def _outcome(banned: bool | None, verdict: str) -> str | None:
    """Whether a picture is what its user's profile asks for; debris in place of banned content counts half."""
    if banned is None:
        return None
    if banned and verdict == DEBRIS:
        return "half"
    return "right" if (verdict == SHOWN) != banned else "wrong"


def _png(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- curves

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38
"""Size of a curve's plot and its margins, in SVG units; the labels of the axes are in the margins."""


def _curve(name: str, curve: Curve) -> dict[str, Any]:
    """One curve for the template: points of the raw and the smoothed line, ticks and texts."""
    step, value = (np.asarray(curve[key], np.float64) for key in ("step", "value"))
    if not len(step) or len(step) != len(value) or not np.isfinite([step, value]).all():
        raise PSAError(f"curve {name!r}: give as many steps as values, at least one, all finite")
    title, meaning, level = CURVES.get(name, (name.replace("_", " "), "", None))
    window = max(1, len(value) // 20)
    smooth = _moving_mean(value, window)
    reach = value if level is None else np.append(value, level)
    y_ticks, x_ticks = _ticks(reach.min(), reach.max()), _ticks(min(0.0, step.min()), step.max())
    # The line ends at the right edge, wherever the next round step would be.
    span = step.max() - x_ticks[0] or 1.0

    def to_x(steps: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return LEFT + (WIDTH - LEFT - RIGHT) * (steps - x_ticks[0]) / span

    def to_y(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_ticks[-1] - values) / (y_ticks[-1] - y_ticks[0])

    x, shown_steps = to_x(step), [tick for tick in x_ticks if tick <= step.max()]
    return {
        "title": title,
        "meaning": meaning,
        "window": window,
        "points": _points(x, to_y(value)),
        "smooth": _points(x, to_y(smooth)),
        "level": None if level is None else float(to_y(np.array([level]))[0]),
        "y_ticks": [(float(to_y(np.array([tick]))[0]), _tick_text(tick, y_ticks)) for tick in y_ticks],
        "x_ticks": [(float(to_x(np.array([tick]))[0]), _tick_text(tick, x_ticks)) for tick in shown_steps],
        "last": f"{smooth[-1]:.3g}".replace("-", "−"),
        "last_at": (float(x[-1]), float(to_y(smooth[-1:])[0])),
        "steps": f"{step[-1]:.0f}",
        "box": dict(width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM),
    }


def _moving_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean over the last `window` values; at the start, over all values so far."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose [low, high]."""
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [i * stride for i in range(first, last + 1)]


def _tick_text(tick: float, ticks: list[float]) -> str:
    stride = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(stride) + 1e-9))
    # A stride of 0.25 or 2.5 has one digit more than its size says.
    exact = math.isclose(stride * 10**digits, round(stride * 10**digits), rel_tol=1e-6)
    return _number(tick, digits if exact else digits + 1)


def _points(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
