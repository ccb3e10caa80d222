"""Numbers of a sweep: seeds aggregated as worked by hand, the best of those that ended, a line for each point."""

import csv
import io
import json

import pytest

from psa_jax.errors import PSAError
from psa_jax.sweeps.results import (
    best_setting,
    direction,
    read_result,
    require_metric,
    settings_of,
    to_csv,
)


def put(workdir, name, *values, state="done", metric="loss"):
    """A point's folder: one row for each value."""
    folder = workdir / name
    folder.mkdir(parents=True)
    rows = [json.dumps({"step": step, metric: value, "time": 1.0}) for step, value in enumerate(values, 1)]
    if rows:
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    if state == "done":
        (folder / "psa_adapter.safetensors").touch()
    if state == "diverged":
        (folder / "nonfinite_3.json").touch()


@pytest.fixture
def results(tmp_path):
    """β 30: losses 1, 2, 3 after three seeds; β 60: 0 and, diverged, 9; β 90: one seed, 4; β 99: nothing yet."""
    points = {}
    for beta, seed, values, state in [
        ("30", 0, (7, 1), "done"),
        ("30", 1, (7, 2), "done"),
        ("30", 2, (7, 3), "done"),
        ("60", 0, (0,), "done"),
        ("60", 1, (9,), "diverged"),
        ("90", 0, (4,), "done"),
        ("99", 0, (), "none"),
    ]:
        name = f"beta={beta},seed={seed}"
        points[name] = {"objective.beta": beta, "seed": str(seed)}
        put(tmp_path, name, *values, state=state)
    return [read_result(tmp_path, name, overrides) for name, overrides in points.items()]


def test_seeds_are_aggregated(results):
    """Of 1, 2, 3: mean 2, deviation 1, t of two degrees of freedom 4.302653, so ± 4.302653/√3 = 2.484138."""
    first, second, third, last = settings_of(results)
    assert first.overrides == {"objective.beta": "30"} and first.label == "beta 30" and first.complete
    mean = first.means["loss"]
    assert (mean.mean, mean.count) == (2.0, 3) and mean.half == pytest.approx(2.484138, abs=1e-6)
    assert second.means["loss"] == (0.0, None, 1) and not second.complete  # one has diverged
    assert third.means["loss"] == (4.0, None, 1) and third.complete
    assert last.means == {} and [each.state for each in last.results] == ["none"]


def test_the_best_is_of_those_that_ended_with_all_seeds(results):
    settings = settings_of(results)
    assert best_setting(settings, "loss", "min").overrides == {"objective.beta": "30"}
    assert best_setting(settings, "loss", "max").overrides == {"objective.beta": "90"}
    assert best_setting(settings, "accuracy", "max") is None
    assert [direction(*each) for each in (("held_out_loss", None), ("accuracy", None), ("loss", "max"))] == [
        "min",
        "max",
        "max",
    ]


def test_the_end_of_a_curve_is_the_mean_of_its_latest_twentieth(tmp_path):
    put(tmp_path, "long", *range(60))
    assert read_result(tmp_path, "long", {}).last == {"loss": 58.0}  # of 57, 58, 59


def test_a_line_for_each_point(results):
    lines = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert [line["point"] for line in lines] == [result.name for result in results]
    assert lines[1] == {
        "point": "beta=30,seed=1",
        "state": "done",
        "steps": "2",
        "objective.beta": "30",
        "seed": "1",
        "loss": "2.0",
    }
    assert (lines[4]["state"], lines[6]["state"], lines[6]["loss"]) == ("diverged", "none", "")


def test_a_metric_that_is_not_there(results, tmp_path):
    require_metric(results, "loss")
    with pytest.raises(PSAError, match=r"--metric=los: no point has it; did you mean loss\?"):
        require_metric(results, "los")
    with pytest.raises(PSAError, match=r"--metric=accuracy: no point has it; there are loss"):
        require_metric(results, "accuracy")
    with pytest.raises(PSAError, match="no point of the sweep has metrics yet"):
        require_metric(results[-1:], "loss")


def test_a_run_that_writes_its_first_row(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert read_result(tmp_path, "new", {}).state == "none"
