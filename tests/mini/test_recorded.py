"""The recorded verdicts of the comparison adapters, and when the demo quotes them."""

import copy
import dataclasses

import numpy as np
import pytest

from psa_jax.data.sage import read_split
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import USER_GROUPS, Verdicts, rates, select_cases
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.protocol import case_of, group_of
from psa_jax.mini.recorded import (
    COMPARED,
    pack_place,
    read_recording,
    recipe_of,
    recorded_verdicts,
    same_recipe,
    write_recording,
)
from psa_jax.preference import objective
from psa_jax.tools.configs import read_config


@pytest.fixture(scope="module")
def sage(tmp_path_factory):
    """SAGE-mini of the default configuration."""
    folder, mini = tmp_path_factory.mktemp("mini") / "sage", read_config("tiny").data.mini
    render_mini(folder, mini.users, mini.seed)
    return folder


def test_recorded_runs_fit_the_default_configuration(sage):
    """The recorded verdicts are of the very cases that the demo judges now."""
    config, recorded = read_config("tiny"), read_recording()
    assert same_recipe(recorded["recipe"], recipe_of(config))
    for place, split in USER_GROUPS.items():
        usual = [case for case in map(case_of, read_split(sage, split)) if group_of(case) == "usual"]
        cases = select_cases(usual, config.evaluate.per_rate[place], config.seed)
        verdicts = recorded_verdicts(recorded[place], cases)
        assert set(verdicts) == {"user_blind", "published_t1"}
        assert abs(rates(verdicts["user_blind"], cases)["selectivity"]) <= 15
        with pytest.raises(PSAError, match=r"judged other cases .*; run psa-jax demo .*--compare"):
            recorded_verdicts(recorded[place], cases[1:])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reference.draws", "4"),
        ("objective.beta", "61"),
        ("objective.reference_kl_weight", "1"),
        ("optimizer.ema", "0.9"),
        ("optimizer.b2", "0.9"),
        ("adapter.tokens", "4"),
        ("adapter.hidden", "16"),
        ("data.banned_share", "0.3"),
        ("data.mini.users", "101"),
        ("data.table", "other.safetensors"),
        ("evaluate.guidance", "5"),
        ("seed", "1"),
        ("steps", "541"),
        ("vae", "other.safetensors"),
    ],
)
def test_another_configuration_is_another_recipe(key: str, value: str):
    assert not same_recipe(read_recording()["recipe"], recipe_of(read_config("tiny", [(key, value)])))


def test_what_changes_no_picture_is_the_same_recipe():
    for key, value in (("evaluate.batch_size", "7"), ("log_every", "3"), ("reference.folder", "runs/errors")):
        assert same_recipe(read_recording()["recipe"], recipe_of(read_config("tiny", [(key, value)])))


def test_a_new_field_of_the_objective_drops_no_recording(monkeypatch):
    """Recorded before the field was there: it counts as its default."""

    @dataclasses.dataclass(frozen=True)
    class Wider(objective.Objective):
        entropy_weight: float = 0.0

    config = read_config("tiny")
    with config.unlocked():
        config.objective = dataclasses.asdict(Wider(**config.objective))
    assert "entropy_weight" in config.objective
    recorded = read_recording()["recipe"]
    assert not same_recipe(recorded, recipe_of(config))  # an unknown field is a difference
    monkeypatch.setattr(objective, "Objective", Wider)
    assert same_recipe(recorded, recipe_of(config))
    with config.unlocked():
        config.objective.entropy_weight = 1.0
    assert not same_recipe(recorded, recipe_of(config))


def test_a_key_that_was_renamed_drops_no_recording():
    recorded = copy.deepcopy(read_recording()["recipe"])
    recorded["objective"]["anchor_weight"] = recorded["objective"].pop("reference_kl_weight")
    assert same_recipe(recorded, recipe_of(read_config("tiny")))
    recorded["objective"]["anchor_weight"] = 2.0
    assert not same_recipe(recorded, recipe_of(read_config("tiny")))


def test_a_recording_is_read_as_it_was_written(sage, tmp_path):
    config = read_config("tiny")
    cases = select_cases([case_of(record) for record in read_split(sage, USER_GROUPS["unseen"])], 7, config.seed)
    rng, bits = np.random.default_rng(0), ("has_content", "clean", "faithful")

    def verdicts() -> Verdicts:
        return Verdicts(**{name: rng.random(len(cases)) < 0.5 for name in bits})

    made = {name: verdicts() for name in ("base", "psa", *COMPARED)}
    write_recording(tmp_path / "recorded.json", recipe_of(config), {"unseen": pack_place(cases, made)})
    recorded = read_recording(tmp_path / "recorded.json")
    assert same_recipe(recorded["recipe"], recipe_of(config))
    again = recorded_verdicts(recorded["unseen"], cases)
    assert set(again) == set(COMPARED)
    for name, verdict in again.items():
        for each in bits:
            np.testing.assert_array_equal(getattr(verdict, each), getattr(made[name], each))
