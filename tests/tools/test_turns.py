"""Ways that take turns, their spread, and the line about a busy machine."""

import json
import os

import pytest

from psa_jax.cli import main
from psa_jax.tools import bench
from psa_jax.tools.turns import Load, spread, take_turns


def fakes(calls: list[str], *names: str):
    return {name: lambda name=name: calls.append(name) or float(len(calls)) for name in names}


def test_two_ways_alternate():
    calls = []
    assert take_turns(fakes(calls, "a", "b"), 3) == [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}, {"a": 5.0, "b": 6.0}]
    assert "".join(calls) == "ababab"


def test_each_is_first_as_often_where_that_is_asked_for():
    calls = []
    take_turns(fakes(calls, "a", "b", "c"), 4, rotate=True)
    assert "".join(calls) == "abcbcacababc"


def test_the_spread_is_that_of_the_turns():
    """One turn in which the other way was disturbed moves neither the median nor the quartiles."""
    assert spread("ratio", [1.0, 1.1, 1.2, 1.3, 5.4], 2) == {"ratio": 1.2, "ratio_quartiles": [1.1, 1.3]}
    assert spread("ratio", [2.0]) == {"ratio": 2.0, "ratio_quartiles": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("before", "after", "busy"),
    [(0.1, 3.9, False), (1.9, 4.9, False), (2.5, 4.0, True), (0.3, 6.5, True), (0.0, 0.0, False)],
)
def test_a_busy_machine_is_named(before, after, busy, capsys, monkeypatch):
    """Four cores: one is ours before measuring, all of them while it lasts."""
    loads = iter([before, after])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert Load().summary() == {"load": [before, after], "cores": 4, "busy": busy}
    said = capsys.readouterr().err
    assert said.count("\n") == busy and (f"busy: load {before} before measuring and {after} after it" in said) == busy


def test_a_machine_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert Load().summary().items() >= {"load": None, "busy": None}.items()


def test_bench_input_alternates_and_tells_its_spread(capsys, monkeypatch):
    calls, real = [], bench.take_turns

    def recorded(ways, turns):
        return real({name: lambda name=name, way=way: calls.append(name) or way() for name, way in ways.items()}, turns)

    monkeypatch.setattr(bench, "take_turns", recorded)
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0 + 8 * (os.cpu_count() or 1), 0.0, 0.0))
    words = ["--seconds=0.1", "--picture-size=32", "--resolution=32", "--batch-size=2", "--threads=1"]
    assert main(["bench", "input", *words]) == 0
    out, err = capsys.readouterr()
    assert calls == ["ours", "original"] * 8
    result = json.loads(out)
    low, high = result["ratio_quartiles"]
    assert 0 < low <= result["ratio"] <= high and result["busy"] is True
    assert "then 0.2 s of measuring" in err and "measuring ours, original: 8/8 turns" in err
    assert "the machine is busy" in err
