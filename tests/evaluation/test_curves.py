"""Learning curves: which lines share a drawing, their points, values under the pointer, and what is refused."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.evaluation.curves import PANELS, curves_of, panels_of, read_rows

ROWS = [
    {"step": 1, "loss": 0.7, "accuracy": 0.5, "accuracy_banned": 0.4, "swap_learnt_banned": 0.0, "time": 1.0},
    {"step": 2, "loss": 0.6, "accuracy": 0.6, "swap_learnt_banned": float("nan"), "time": 2.0},
    {"step": 3, "loss": 0.5, "accuracy": 0.7, "accuracy_banned": 0.8, "held_out_accuracy": 0.65, "time": 3.0},
]


def panel(title: str, curves: dict) -> dict:
    (found,) = [each for each in panels_of(curves) if each["title"] == title]
    return found


def test_what_belongs_together_shares_a_drawing():
    curves = curves_of(ROWS)
    assert "time" not in curves and curves["accuracy_banned"] == {"step": [1, 3], "value": [0.4, 0.8]}
    assert curves["swap_learnt_banned"] == {"step": [1], "value": [0.0]}  # NaN is left out
    assert [each["title"] for each in panels_of(curves)] == ["Loss", "Swap learnt", "Preference accuracy"]
    lines = panel("Preference accuracy", curves)["lines"]
    assert [(line["label"], line["last"]) for line in lines] == [
        ("all", "0.7"),
        ("banned", "0.8"),
        ("held out", "0.65"),
    ]


def test_lines_of_one_drawing_have_one_scale():
    drawn = panel("Preference accuracy", curves_of(ROWS))
    points = {line["label"]: np.array([p.split(",") for p in line["points"].split()], float) for line in drawn["lines"]}
    # One affine map takes steps and values of every line to its points.
    given = {"all": [(1, 0.5), (2, 0.6), (3, 0.7)], "banned": [(1, 0.4), (3, 0.8)], "held out": [(3, 0.65)]}
    for axis in (0, 1):
        values = np.array([pair[axis] for pairs in given.values() for pair in pairs])
        places = np.concatenate([points[label][:, axis] for label in given])
        slope, offset = np.polyfit(values, places, 1)
        np.testing.assert_allclose(places, slope * values + offset, atol=0.11)
        assert (slope > 0) == (axis == 0)  # SVG counts downwards


def test_a_step_says_the_values_of_all_lines():
    drawn = panel("Preference accuracy", curves_of(ROWS))
    names = [line["label"] for line in drawn["lines"]]
    said = {band["step"]: {names[number]: text for number, _, _, text in band["says"]} for band in drawn["bands"]}
    assert said == {
        "1": {"all": "0.5", "banned": "0.4"},
        "2": {"all": "0.6", "banned": "0.4"},  # its latest
        "3": {"all": "0.7", "banned": "0.8", "held out": "0.65"},
    }
    points = [float(point.split(",")[0]) for point in drawn["lines"][names.index("banned")]["points"].split()]
    assert drawn["bands"][1]["says"][1][1] == pytest.approx(points[0], abs=0.06)  # its dot is on its line
    # Where the pointer is, exactly one step answers, and it is the nearest.
    bands = drawn["bands"]
    assert (bands[0]["start"], bands[-1]["end"]) == (0.0, 420)
    for left, right in itertools.pairwise(bands):
        assert left["end"] == right["start"] == pytest.approx((left["x"] + right["x"]) / 2)


def test_a_long_run_says_some_of_its_steps():
    bands = panel("Loss", {"loss": {"step": list(range(1000)), "value": [-1.0] * 1000}})["bands"]
    assert len(bands) == 50 and (bands[0]["step"], bands[-1]["step"]) == ("0", "999")
    assert bands[7]["says"][0][3] == "−1"


def test_a_metric_of_no_drawing_has_its_own():
    assert [each["title"] for each in panels_of({"my metric": {"step": [1], "value": [2.0]}})] == ["my metric"]


def test_metrics_are_in_one_drawing_each():
    metrics = [metric for each in PANELS for metric in each.series.values()]
    assert len(metrics) == len(set(metrics))


def test_the_command_draws_a_run(tmp_path: Path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "lo')
    config = {"steps": 9, "batch_size": 4, "seed": 3, "dtype": "float32", "model": "<b>tiny</b>"}
    config |= {"adapter": {"kind": "edit", "tokens": 0, "gate": "categories"}, "objective": {"loss": "none"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["curves", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3
    page = (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert "3 of 9" in page and "&lt;b&gt;tiny" in page and re.search(r"step 3</tspan>.*>banned 0\.8</tspan>", page)
    assert not re.search(r"<script|https?:|url\(", page)


def test_a_run_without_a_configuration_is_drawn(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert main(["curves", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("text", "says"), [(None, "no such file; give the --workdir"), ("", "no row yet"), ("{\n", "line 1")]
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str | None, says: str):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PSAError, match=says):
        read_rows(path)


def test_a_run_without_a_finite_metric_is_refused(tmp_path: Path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "other": 2.0}\n')
    assert main(["curves", str(tmp_path)]) == 1
    assert "no finite metric to draw" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[1e29, -1e29], [0.0, 5e-324], [1.0, 1.0 + 1e-15]])
def test_numbers_of_any_size_are_drawn(values: list[float]):
    drawn = panel("Loss", {"loss": {"step": [1, 2], "value": values}})
    assert all(np.isfinite([float(n) for n in p.split(",")]).all() for p in drawn["lines"][0]["points"].split())
