"""Points of a sweep: products, zips and their names; what cannot be told apart is refused."""

import json
import re

import pytest

from psa_jax.errors import PSAError
from psa_jax.sweeps.plan import PLAN_FILE, Point, describe, points_of, record, recorded

VALUES = {
    "": [{"steps": 5}],
    "beta": [{"objective.beta": 30.0}, {"objective.beta": 60.0}],
    "seed": [{"seed": 0}, {"seed": 1}, {"seed": 2}],
    "rate": [{"optimizer.learning_rate": 1e-4}, {"optimizer.learning_rate": 3e-4}],
    "both": [{"objective.beta": 1.0, "seed": 7}],
}


def points(expression: str, values=VALUES) -> list[dict[str, str]]:
    return [point.overrides for point in points_of(expression, values.__getitem__)]


def test_a_comma_takes_all_pairs_the_last_fastest():
    assert points("beta,seed") == [
        {"objective.beta": beta, "seed": seed} for beta in ("30.0", "60.0") for seed in ("0", "1", "2")
    ]
    assert points("") == [{"steps": "5"}]


def test_a_plus_goes_through_both_at_once():
    assert points("beta+rate") == [
        {"objective.beta": "30.0", "optimizer.learning_rate": "0.0001"},
        {"objective.beta": "60.0", "optimizer.learning_rate": "0.0003"},
    ]
    assert len(points("beta+rate,seed")) == 6


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("beta+seed", "--sweep=beta+seed: beta has 2, seed has 3 values; + wants as many of each, a comma takes all "),
        ("beta,,seed", "--sweep=beta,,seed: a name is empty; write such as beta,seed or beta+learning_rate"),
        ("beta,beta", "--sweep=beta,beta: beta is named twice; name each generator once"),
        ("beta,both", "--sweep=beta,both: two of the generators set objective.beta; use one of them"),
        ("beta+both", "--sweep=beta+both: beta has 2, both has 1 values; "),
    ],
)  # fmt: skip
def test_what_is_no_sweep(expression, said):
    with pytest.raises(PSAError) as caught:
        points(expression)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"objective.beta": "30.0", "seed": "1"}, "beta=30.0,seed=1"),
        ({"seed": "1", "data.mini.seed": "2"}, "seed=1,data.mini.seed=2"),
        ({"optimizer.learning_rate": "1e-05"}, "learning_rate=1e-05"),
        ({"objective.sft_weight": "-0.5"}, "sft_weight=-0.5"),
        ({"data.table": "/home/someone/../tables/all users.safetensors"}, "table=all-users.safetensors"),
        ({"pretrain.unet.widths": "(32, 64)"}, "widths=32-64"),
        ({"adapter.qk_dim": "None", "model": "a/b/"}, "qk_dim=None,model=b"),
        ({"model": "../.."}, "model="),
    ],
)
def test_names(overrides, name):
    assert Point(overrides).name == name


def test_a_name_that_is_too_long_is_cut_and_stays_its_own():
    first, second = (Point({"model": "m" * 200 + end}).name for end in "ab")
    assert first != second and first[:100] == second[:100] and len(first) <= 130


def test_a_label_suits_kubernetes():
    first, second = (Point({"objective.beta": "30.0", "model": text}).label for text in ("A" * 90, "A" * 91))
    assert first != second
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(label) <= 28 for label in (first, second))


@pytest.mark.parametrize(("first", "second"), [("a/x", "b/x"), ("A", "a")])
def test_two_points_of_one_name_are_refused(first, second):
    with pytest.raises(PSAError, match=r"^two points have the name model=.*; give values that differ more$"):
        points("model", {"model": [{"model": first}, {"model": second}]})


def test_the_plan_says_how_many_and_which():
    plan = describe(points_of("beta,seed", VALUES.__getitem__)).splitlines()
    assert plan[0] == "6 points:" and plan[-1] == "  beta=60.0,seed=2: objective.beta=60.0 seed=2" and len(plan) == 7
    assert describe([Point({"seed": "1"})]).startswith("1 point:")


def test_the_record_grows_and_is_of_one_configuration(tmp_path):
    first, second = points_of("beta", VALUES.__getitem__), points_of("seed", VALUES.__getitem__)
    record(tmp_path, "tiny", [("steps", "5")], second)
    record(tmp_path, "tiny:dpo", [], first)  # nothing had begun
    assert recorded(tmp_path) == {point.name: point.overrides for point in first}
    (tmp_path / first[0].name).mkdir()
    record(tmp_path, "tiny:dpo", [], second)
    assert list(recorded(tmp_path)) == [point.name for point in [*first, *second]]
    with pytest.raises(PSAError, match=r"holds a sweep of tiny:dpo \(nothing set\), not of tiny \(steps=5\); "):
        record(tmp_path, "tiny", [("steps", "5")], first)
    assert json.loads((tmp_path / PLAN_FILE).read_text())["config"] == "tiny:dpo"


def test_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(PSAError, match="file not found; give the --workdir of a psa-jax sweep"):
        recorded(tmp_path)
    (tmp_path / PLAN_FILE).write_text('{"points": {}}')
    with pytest.raises(PSAError, match="names no points"):
        recorded(tmp_path)
