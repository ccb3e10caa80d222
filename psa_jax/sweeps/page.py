"""The page of a sweep: one self-contained HTML file with parallel coordinates, a table and curves."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.evaluation.curves import PANELS, TEMPLATES, Curve, Panel, drawing, render, round_ticks, tick_text
from psa_jax.files import write
from psa_jax.sweeps.results import Mean, Result, Setting, best_setting

MOST_LINES = 5
"""Settings in a drawing of curves: the colours that a page has."""
COLUMNS = (
    "loss",
    "accuracy",
    "swap_learnt_banned",
    "winner_gap",
    "held_out_loss",
    "held_out_accuracy",
    "held_out_winner_gap",
    "held_out_swap_learnt_banned",
    "held_out_swap_learnt_allowed",
)
"""Metrics of the table and of the curves, beside the one that decides."""
_WIDTH, _TOP, _BOTTOM, _LEFT, _RIGHT, _HEIGHT = 900, 46, 16, 70, 96, 320


def write_page(
    path: Path, results: Sequence[Result], settings: Sequence[Setting], metric: str, best: str, facts: Mapping[str, str]
) -> None:
    """Writes the page, completely or not at all.

    Args:
      path: the HTML file, in an existing folder.
      results: of all points.
      settings: the same points by setting.
      metric: that decides.
      best: max or min.
      facts: name → what to say above the drawings.

    Raises:
      PSAError: the page cannot be written.
    """
    script = (TEMPLATES / "sweep.js").read_text(encoding="utf-8")
    columns = [metric, *(name for name in COLUMNS if name != metric and any(name in each.last for each in results))]
    ranked = _ranked(settings, metric, best)
    winner = best_setting(settings, metric, best)
    keys = list(dict.fromkeys(key for each in settings for key in each.overrides))
    text = render(
        "sweep.html.j2",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        points=len(results),
        ended={
            state: sum(each.state == state for each in results) for state in ("done", "diverged", "unfinished", "none")
        },
        metric=metric,
        best=best,
        winner=None if winner is None else {"label": winner.label, "value": _text(winner.means[metric])},
        facts=facts,
        parallel=_parallel(results, metric, best),
        choices={
            key: _values(results, key) for key in dict.fromkeys(key for each in results for key in each.overrides)
        },
        keys=keys,
        columns=columns,
        rows=[_row(each, keys, columns, each is winner) for each in ranked],
        panels=_panels(ranked, columns),
        drawn=min(MOST_LINES, len(ranked)),
    )
    write(path, text)


def _ranked(settings: Sequence[Setting], metric: str, best: str) -> list[Setting]:
    """Best first; those that lack the metric come last, in their order."""
    sign = -1.0 if best == "max" else 1.0

    def place(each: Setting) -> tuple[bool, float]:
        return metric not in each.means, sign * each.means[metric].mean if metric in each.means else 0.0

    return sorted(settings, key=place)


def _row(setting: Setting, keys: Sequence[str], columns: Sequence[str], best: bool) -> dict[str, Any]:
    count = len(setting.results)
    done = sum(each.state == "done" for each in setting.results)
    others = {
        state: sum(each.state == state for each in setting.results) for state in ("diverged", "unfinished", "none")
    }
    words = ", ".join(
        f"{number} {'not begun' if state == 'none' else state}" for state, number in others.items() if number
    )
    return {
        "best": best,
        "overrides": setting.overrides,
        "values": [setting.overrides.get(key, "–") for key in keys],
        "seeds": f"{done} of {count}" if done < count else str(count),
        "others": words,
        "cells": [_cell(setting.means.get(metric)) for metric in columns],
    }


def _cell(mean: Mean | None) -> tuple[str, str]:
    if mean is None:
        return "–", ""
    return _number(mean.mean), "" if mean.half is None else f"± {_number(mean.half)}"


def _text(mean: Mean) -> str:
    return " ".join(filter(None, _cell(mean)))


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


# --- parallel coordinates


def _parallel(results: Sequence[Result], metric: str, best: str) -> dict[str, Any] | None:
    """A vertical axis for each key and one for the metric; a line for each point that has it and did not diverge."""
    shown = [each for each in results if metric in each.last and each.state != "diverged"]
    if not shown:
        return None
    keys = list(dict.fromkeys(key for each in results for key in each.overrides))
    gap = (_WIDTH - _LEFT - _RIGHT) / max(1, len(keys))
    low, high = _HEIGHT - _BOTTOM, _TOP
    axes, place = [], {}
    ends_of = [key.rpartition(".")[2] for key in [*keys, metric]]
    for number, key in enumerate(keys):
        values = _values(results, key)
        place[key] = {value: low + (high - low) * ((index + 0.5) / len(values)) for index, value in enumerate(values)}
        title = key if ends_of.count(key.rpartition(".")[2]) > 1 else key.rpartition(".")[2]
        axes.append(_axis(title, _LEFT + gap * number, [(place[key][value], value or "–") for value in values], number))
    ends = [each.last[metric] for each in shown]
    ticks = round_ticks(min(ends), max(ends))

    def height(value: float) -> float:
        return low + (high - low) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    last = _LEFT + gap * len(keys)
    axes.append(_axis(metric, last, [(height(tick), tick_text(tick, ticks)) for tick in ticks], len(keys), right=True))
    order = sorted(range(len(shown)), key=lambda i: ends[i], reverse=best == "max")
    rank = {index: number for number, index in enumerate(order)}
    lines = [
        {
            "name": each.name,
            "overrides": each.overrides,
            "state": each.state,
            "value": _number(each.last[metric]),
            # From 1 for the best to 0 for the last.
            "share": round(1.0 - rank[i] / max(1, len(shown) - 1), 3),
            "points": _path(
                [(_LEFT + gap * n, place[key][each.overrides.get(key, "")]) for n, key in enumerate(keys)]
                + [(last, height(each.last[metric]))]
            ),
        }
        for i, each in enumerate(shown)
    ]
    # The best is drawn last, on top of the others.
    lines.sort(key=lambda line: line["share"])
    return {"width": _WIDTH, "height": _HEIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM, "axes": axes, "lines": lines}


def _axis(
    title: str, x: float, marks: Sequence[tuple[float, str]], number: int, *, right: bool = False
) -> dict[str, Any]:
    return {
        "title": title,
        "x": round(x, 1),
        "marks": [(round(y, 1), text) for y, text in marks],
        # Labels of the first axis have room on its left, all others on their right.
        "anchor": "start" if right or number else "end",
        "shift": 8 if right or number else -8,
        # Titles of neighbours are on two lines, so that long ones do not meet.
        "title_y": 16 if number % 2 == 0 else 32,
    }


def _values(results: Sequence[Result], key: str) -> list[str]:
    """The values of a key, numbers by size and before words; "" for points that leave it as it is."""

    def order(text: str) -> tuple[bool, float, str]:
        try:
            value = float(text)
        except ValueError:
            value = math.inf
        return math.isinf(value), value, text

    return sorted({each.overrides.get(key, "") for each in results}, key=order)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


# --- curves


def _panels(ranked: Sequence[Setting], columns: Sequence[str]) -> list[dict[str, Any]]:
    """A drawing for each metric, with a line for each of the best settings: the mean over its points."""
    meanings = {name: panel for panel in PANELS for name in panel.series.values()}
    drawn = []
    for metric in columns:
        curves = {}
        for setting in ranked[:MOST_LINES]:
            ended = [each for each in setting.results if each.state == "done"] or setting.results
            curve = _mean_curve([each.curves[metric] for each in ended if metric in each.curves])
            if curve is not None:
                curves[setting.label] = curve
        if curves:
            panel = meanings.get(metric)
            drawn.append(
                drawing(
                    Panel(
                        metric.replace("_", " "),
                        "" if panel is None else panel.meaning,
                        None if panel is None else panel.level,
                        {label: label for label in curves},
                    ),
                    curves,
                )
            )
    return drawn


def _mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """The mean of several curves at the steps that all of them have; None where there is no such step."""
    if not curves:
        return None
    values = [dict(zip(curve["step"], curve["value"], strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(each) for each in values)))
    if not steps:
        return None
    return {"step": steps, "value": [float(np.mean([each[step] for each in values])) for step in steps]}
