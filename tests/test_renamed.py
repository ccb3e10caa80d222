"""Old names work for one release and print one line on stderr."""

import re
from pathlib import Path

import pytest

import psa_jax
from psa_jax.preference.objective import Objective
from psa_jax.renamed import KEYS, UNTIL, print_notice, renamed_keys
from psa_jax.tools.configs import read_config, shipped

ANCHOR = (
    r"psa-jax: (--config\.)?objective\.anchor_weight is now called (--config\.)?objective\.reference_kl_weight; "
    rf"the old name works until psa_jax {re.escape(UNTIL)}\n"
)
FILE = """from psa_jax.preference.objective import Objective
import dataclasses, ml_collections
def get_config():
    config = ml_collections.ConfigDict()
    config.objective = dataclasses.asdict(Objective({in_call}))
    {in_group}
    return config
"""


@pytest.fixture(autouse=True)
def first_time():
    """Notices come once per process: every test here starts a new one, as far as they can tell."""
    print_notice.cache_clear()


def test_old_names_are_gone_in_the_version_that_the_notice_names() -> None:
    release = [int(part) for part in psa_jax.__version__.split(".")[:3]]
    assert release < [int(part) for part in UNTIL.split(".")], "remove the old names: empty the tables of renamed.py"


def test_every_new_key_exists() -> None:
    config = read_config("tiny")
    for old, new in KEYS.items():
        group, name = new.split(".")
        assert name in config[group]
        assert old.split(".")[0] == group
        assert old.split(".")[1] not in config[group]


def test_an_old_key_on_the_command_line(capsys) -> None:
    overrides = [("objective.anchor_weight", "3"), ("objective.anchor_weight", "4")]
    assert read_config("tiny", overrides).objective.reference_kl_weight == 4.0
    assert re.fullmatch(ANCHOR, capsys.readouterr().err)


@pytest.mark.parametrize(
    "place", [{"in_call": "anchor_weight=4.0"}, {"in_group": "config.objective.anchor_weight = 4.0"}], ids="-".join
)
def test_an_old_key_in_a_file(place: dict[str, str], tmp_path: Path, capsys) -> None:
    path = tmp_path / "own.py"
    path.write_text(FILE.format(**{"in_call": "", "in_group": "config.objective.beta = 7.0"} | place))
    config = read_config(str(path))
    assert config.objective.reference_kl_weight == 4.0
    assert "anchor_weight" not in config.objective
    assert Objective(**config.objective).reference_kl_weight == 4.0
    assert re.fullmatch(ANCHOR, capsys.readouterr().err)


def test_new_names_print_nothing(capsys) -> None:
    for name in shipped():
        read_config(name, [("objective.reference_kl_weight", "1")])
    Objective(reference_kl_weight=1.0)
    assert capsys.readouterr().err == ""


def test_saved_keys_are_renamed_in_place() -> None:
    saved = {"seed": 1, "objective": {"beta": 2.0, "anchor_weight": 3.0, "loss": "dpo"}}
    renamed = renamed_keys(saved)
    assert renamed == {"seed": 1, "objective": {"beta": 2.0, "reference_kl_weight": 3.0, "loss": "dpo"}}
    assert list(renamed["objective"]) == ["beta", "reference_kl_weight", "loss"]
    assert saved["objective"]["anchor_weight"] == 3.0  # a copy
    for other in ({}, {"objective": {}}, {"objective": None}, {"anchor_weight": 1.0}):
        assert renamed_keys(other) == other
