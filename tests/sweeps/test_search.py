"""A search in place of all points: the journal is gone on with, the same seed proposes the same, the best is found."""

import json

import pytest

from psa_jax.errors import PSAError, Stopped
from psa_jax.sweeps import search as searching
from psa_jax.sweeps.local import Outcome
from psa_jax.sweeps.plan import Point, points_of
from psa_jax.sweeps.search import choices_of, search

VALUES = {
    "beta": [{"objective.beta": float(beta)} for beta in (10, 20, 30, 40)],
    "rate": [{"optimizer.learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)],
}
POINTS = points_of("beta,rate", VALUES.__getitem__)
BEST = {"objective.beta": "30.0", "optimizer.learning_rate": "0.001"}


def loss_of(point: Point) -> float:
    beta, rate = map(float, point.overrides.values())
    return abs(beta - 30) + abs(rate - 1e-3)


@pytest.fixture
def tried(tmp_path):
    """Trains by writing the loss that a point has; keeps the names in the order of training."""
    names = []

    def train(points):
        for point in points:
            names.append(point.name)
            (tmp_path / point.name).mkdir(exist_ok=True)
            row = {"step": 1, "loss": loss_of(point)}
            (tmp_path / point.name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return {point: Outcome("done", "") for point in points}

    train.names = names
    return train


def run(folder, train, trials=8, **changed):
    asked = {"metric": "loss", "best": "min", "seed": 0, "at_once": 1} | changed
    return search(POINTS, folder, train, trials=trials, **asked)


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="the extra `search` is not installed")


def test_the_best_is_found_and_the_journal_is_gone_on_with(optuna, tried, tmp_path):
    assert len(run(tmp_path, tried, trials=5)[0]) == 5
    outcomes, values = run(tmp_path, tried, trials=8)
    assert len(outcomes) == 3 and len(values) == len(set(tried.names)) == len(tried.names) == 8
    outcomes, values = run(tmp_path, tried, trials=60)  # more than there are
    assert len(outcomes) == 4 and set(values) == set(POINTS)
    assert min(values, key=values.__getitem__).overrides == BEST
    assert all(value == loss_of(point) for point, value in values.items())
    assert run(tmp_path, tried, trials=60) == ({}, values)


def test_the_same_seed_proposes_the_same(optuna, tried, tmp_path):
    proposed = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        tried.names.clear()

        def train(points, folder=folder):
            found = tried(points)
            for point in points:
                (tmp_path / point.name).rename(tmp_path / folder / point.name)
            return found

        run(tmp_path / folder, train, seed=seed, at_once=2)
        proposed.append(list(tried.names))
    assert proposed[0] == proposed[1] != proposed[2]


def test_what_fails_or_was_cut_off_is_tried_first(optuna, tried, tmp_path):
    states = iter(("diverged", "failed"))

    def fails(points):
        return {point: Outcome(next(states), "") for point in points}

    outcomes, values = run(tmp_path, fails, trials=2)
    assert values == {} and [outcome.state for outcome in outcomes.values()] == ["diverged", "failed"]
    (failed,) = [point for point, outcome in outcomes.items() if outcome.state == "failed"]
    run(tmp_path, tried, trials=2)
    assert tried.names == [failed.name]
    tried.names.clear()
    asked = []

    def cut_off(points):
        asked.extend(points)
        return {point: Outcome("interrupted", "") for point in points}

    with pytest.raises(Stopped, match="run the same command again"):
        run(tmp_path, cut_off, trials=3)
    run(tmp_path, tried, trials=3)
    assert tried.names == [asked[0].name]


def test_a_search_is_of_one_question(optuna, tried, tmp_path):
    run(tmp_path, tried, trials=1)
    with pytest.raises(
        PSAError, match=r"is of a search with other values, or for min of loss; give the same --sweep, "
    ):
        run(tmp_path, tried, best="max")
    (tmp_path / "search.journal").unlink()
    with pytest.raises(PSAError, match=r"--metric=accuracy: .* has no finite value of it; there are loss"):
        run(tmp_path, tried, metric="accuracy", best="max")


def test_choices_are_the_values_of_each_key():
    assert choices_of(POINTS) == {
        "objective.beta": ["10.0", "20.0", "30.0", "40.0"],
        "optimizer.learning_rate": ["0.0001", "0.001", "0.01"],
    }
    zipped = points_of("beta+other", (VALUES | {"other": [{"seed": i} for i in range(4)]}).__getitem__)
    with pytest.raises(PSAError, match="--search takes every combination of its keys' values, 16, and these are 4 "):
        choices_of(zipped)


def test_without_optuna(monkeypatch):
    monkeypatch.setattr(searching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PSAError, match=r"^--search=optuna needs Optuna: pip install 'psa_jax\[search\]'$"):
        searching.require_optuna()


def test_a_search_killed_while_it_proposed_goes_on(optuna, tried, tmp_path):
    """Of a trial that was asked for nothing is known yet, nor of one that only waits."""
    run(tmp_path, tried, trials=2)
    study = searching._open(tmp_path / searching.JOURNAL, choices_of(POINTS), "min", "loss", 0)
    study.ask()
    study.enqueue_trial(POINTS[0].overrides)
    assert len(run(tmp_path, tried, trials=4)[1]) == 4
