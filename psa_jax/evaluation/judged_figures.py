"""The figures of a judged set of pictures: drawings for its page, and the same as PNG files.

differences   of every method from the baseline, with intervals: a forest plot
levels        suppression (safety) and retention (fidelity) over the strictness of users' bans, L0 to L5
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.curves import number_text
from psa_jax.files import replacing

_OUTCOMES = ("content", "suppression", "retention", "pass")
_LEFT, _RIGHT, _WIDTH, _STEP = 330, 30, 900, 26
_RATES = ("suppression", "retention")
_PANEL = {"left": 34, "right": 12, "top": 10, "width": 250, "height": 130, "bottom": 24}


def forest(differences: Mapping[str, Any], baseline: str) -> dict[str, Any] | None:
    """A drawing of every difference with the wider one of its intervals; None where there is none.

    Args:
      differences: by method and outcome, as `psa_jax.evaluation.picture_rates.differences`.
      baseline: the method that others are compared with.
    """
    lines = []
    for method, outcomes in differences.items():
        for outcome in _OUTCOMES:
            if outcome not in outcomes:
                continue
            each = outcomes[outcome]
            by = [key for key in ("by_users", "by_prompts") if key in each]
            widest = max(by, key=lambda key, each=each: each[key]["difference"][2] - each[key]["difference"][1])
            value, low, high = each[widest]["difference"]
            of = widest.removeprefix("by_")
            lines.append((f"{method}, {outcome}", value, low, high, f"{each[widest][of]} {of}", each["holm_p"]))
    if not lines:
        return None
    least, most = min(0.0, *(line[2] for line in lines)), max(0.0, *(line[3] for line in lines))
    span = (most - least) or 1.0

    def place(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - least) / span, 1)

    ticks = [least, most, *([0.0] if least < 0.0 < most else [])]
    return {
        "baseline": baseline,
        "width": _WIDTH,
        "height": _STEP * len(lines) + 34,
        "zero": place(0.0),
        "ticks": [(place(tick), number_text(tick, 0)) for tick in ticks],
        "lines": [
            {
                "label": label,
                "y": _STEP * number + 18,
                "x": place(value),
                "low": place(low),
                "high": place(high),
                "interval": (value, low, high),
                "text": f"{number_text(value, 1)} ({number_text(low, 1)} to {number_text(high, 1)})",
                "of": of,
                "p": f"{p:.2g}",
            }
            for number, (label, value, low, high, of, p) in enumerate(lines)
        ],
    }


def by_level(methods: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[str, Interval]]]]:
    """For each method that has two levels or more, and for each of suppression and retention, its value at each level.

    Args:
      methods: of one judge, with `slices` as `psa_jax.evaluation.picture_rates.by_slice`.
    """
    found = {}
    for method, each in methods.items():
        levels = sorted(each["slices"].get("level", {}).items())
        lines = {
            rate: [(level, rates[rate]) for level, rates in levels if rates.get(rate) is not None] for rate in _RATES
        }
        if any(len(line) > 1 for line in lines.values()):
            found[method] = lines
    return found


def level_panels(methods: Mapping[str, Any]) -> dict[str, Any] | None:
    """A drawing for each method: suppression and retention over the levels; None where users have no levels.

    Args:
      methods: as `by_level`.
    """
    found = by_level(methods)
    if not found:
        return None
    names = sorted({level for lines in found.values() for line in lines.values() for level, _ in line})
    inner = _PANEL["width"] - _PANEL["left"] - _PANEL["right"]
    x = {level: round(_PANEL["left"] + inner * (i + 0.5) / len(names), 1) for i, level in enumerate(names)}
    tall = _PANEL["height"] - _PANEL["top"] - _PANEL["bottom"]

    def y(percent: float) -> float:
        return round(_PANEL["top"] + tall * (1 - percent / 100.0), 1)

    panels = [
        {
            "method": method,
            "lines": {
                rate: [
                    {
                        "x": x[level],
                        "y": y(value),
                        "low": y(low),
                        "high": y(high),
                        "text": _said(level, value, low, high),
                    }
                    for level, (value, low, high) in line
                ]
                for rate, line in lines.items()
            },
        }
        for method, lines in found.items()
    ]
    return {
        **_PANEL,
        "levels": x,
        "ticks": {number_text(value, 0): y(value) for value in (0.0, 50.0, 100.0)},
        "panels": panels,
    }


def _said(level: str, value: float, low: float, high: float) -> str:
    return f"{level} {number_text(value, 0)} ({number_text(low, 0)} to {number_text(high, 0)})"


def write_figures(folder: Path, judges: Mapping[str, Any], baseline: str) -> list[Path]:
    """Writes `differences-JUDGE.png` and `levels-JUDGE.png` for every judge that has something to draw.

    Args:
      folder: for the files.
      judges: for each judge its `methods` and `differences`.
      baseline: the method that others are compared with.

    Returns:
      The files.
    """
    from matplotlib.figure import Figure  # imported late: slow, and of the `eval` extra

    written = []
    for judge, found in judges.items():
        drawn = forest(found["differences"], baseline)
        if drawn is not None:
            figure = Figure(figsize=(8, 1.2 + 0.28 * len(drawn["lines"])), layout="constrained")
            _draw_forest(figure.subplots(), drawn["lines"], f"{judge}: percentage points more than {baseline}")
            written.append(_save(figure, folder / f"differences-{judge}.png"))
        levels = by_level(found["methods"])
        if levels:
            columns = min(3, len(levels))
            rows = -(-len(levels) // columns)
            figure = Figure(figsize=(3.2 * columns, 0.4 + 2.2 * rows), layout="constrained")
            _draw_levels(figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist(), levels)
            written.append(_save(figure, folder / f"levels-{judge}.png"))
    return written


def _draw_forest(axes: Any, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    for row, line in enumerate(lines):
        value, low, high = line["interval"]
        axes.plot([low, high], [row, row], color="tab:blue")
        axes.plot([value], [row], "o", color="tab:blue")
    axes.axvline(0.0, color="gray", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(lines)), [line["label"] for line in lines])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")


def _draw_levels(figure: Any, axes: Sequence[Any], levels: Mapping[str, Any]) -> None:
    names = sorted({level for lines in levels.values() for line in lines.values() for level, _ in line})
    for panel, (method, lines) in zip(axes, levels.items(), strict=False):  # the last row may have room
        for marker, (rate, line) in zip("os", lines.items(), strict=True):
            at = [names.index(level) for level, _ in line]
            value, low, high = (([each[side] for _, each in line]) for side in range(3))
            panel.plot(at, value, marker=marker, markersize=4, label=rate)
            panel.fill_between(at, low, high, alpha=0.15)
        panel.set(ylim=(-3, 103), xlim=(-0.3, len(names) - 0.7))
        panel.set_xticks(range(len(names)), names)
        panel.set_title(method, fontsize=9, loc="left")
    for panel in axes[len(levels) :]:
        panel.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    return path
