"""`psa-jax compare`: what has ended is tabulated and not run again; a method that is added is trained and measured."""

import json

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.data.sage import read_split
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.mini.comparison import Method, Result, config_of, write_result
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.protocol import HARDER, grouped_cases
from psa_jax.tools.configs import read_config

# With eight users there is a category that nobody allows, so that pairs cannot be balanced.
SETTINGS = {
    "data.mini.users": 8,
    "data.balance": "none",
    "validate.rows": 32,  # of 8 none is a banned prompt
    "validate.batch_size": 16,
    "evaluate.per_rate.harder": 1,
}


@pytest.fixture
def words(tmp_path, pytestconfig):
    config = f"--config={pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke"
    return ["compare", config, f"--workdir={tmp_path}", *(f"--config.{key}={value}" for key, value in SETTINGS.items())]


@pytest.fixture
def ended(tmp_path, pytestconfig):
    """The verdicts of two runs, made up: the first suppresses all that is banned, the second nothing."""
    config = read_config(
        f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke", [(key, str(value)) for key, value in SETTINGS.items()]
    )
    render_mini(tmp_path / "data" / "sage", 8, config.data.mini.seed)
    records = read_split(tmp_path / "data" / "sage", "test_unseen")
    most = {"usual": config.evaluate.per_rate.unseen} | dict.fromkeys(HARDER, 1)
    cases = grouped_cases(records, most, config.data.mini.seed)
    for name, learnt in (("edit", 0.95), ("text", 0.4)):
        verdicts = {}
        for group, members in cases.items():
            banned = np.array([case.banned for case in members])
            has = ~banned if name == "edit" else np.ones(len(members), bool)
            verdicts[group] = Verdicts(has_content=has, clean=~has, faithful=np.ones(len(members), bool))
        method = Method(name, "swap", 4)
        folder = tmp_path / f"{name}-swap-4-seed0"
        folder.mkdir()
        result = Result(method, 0, verdicts, learnt, 9.0)
        write_result(folder, result, config_of(method, 0, config, read_config("tiny:dpo")), cases)


def test_runs_that_have_ended_are_tabulated(tmp_path, words, ended, capsys, refused):
    assert main([*words, "--methods=edit-swap,text-swap"]) == 0
    out, err = capsys.readouterr()
    assert "compiling the training step" not in err
    assert json.loads(out.splitlines()[-1]) == {"table": str(tmp_path / "table.md"), "runs": 2}
    table = (tmp_path / "table.md").read_text()
    assert table.count("| edit | swap | 4 | 1 | 100.0 (") == 1 + len(HARDER) and table in out
    assert "| text | swap | 4 | 1 | 0.0 (" in table and "– | 100.0" in table  # nothing suppressed: no clean rate
    first, second = json.loads((tmp_path / "runs.json").read_text())
    assert (first["method"], first["selectivity"], first["clean"]) == ("edit-swap-4", 100.0, 100.0)
    assert (second["method"], second["selectivity"], second["clean"]) == ("text-swap-4", 0.0, None)
    with Image.open(tmp_path / "swap_learnt.png") as plot:
        assert plot.size[0] > 400

    assert main([*words, "--methods=text-swap"]) == 0  # the table keeps what an earlier call has made
    assert "| edit | swap | 4 | 1 | 100.0 (" in (tmp_path / "table.md").read_text()
    assert "config.objective is not that of tiny" in refused(
        *words, "--methods=text-swap", "--config.objective.beta=7.0"
    )
    error = refused(*words, "--methods=text-swap", "--config.evaluate.guidance=2.0")
    assert "another configuration" in error and "--workdir" in error
    assert "names one method twice" in refused(*words, "--methods=text-swap,text-swap")
    assert "write ADAPTER-OBJECTIVE" in refused(*words, "--methods=text")


@pytest.mark.slow
def test_a_method_that_is_added_is_trained(tmp_path, words, ended, capsys):
    assert main([*words, "--methods=edit-swap,text-dpo"]) == 0
    out, err = capsys.readouterr()
    assert "text-dpo-4, seed 0: 4 steps of 4 pairs" in err and "edit-swap-4, seed 0" not in err
    rows = {row["method"]: row for row in json.loads((tmp_path / "runs.json").read_text())}
    assert set(rows) == {"edit-swap-4", "text-swap-4", "text-dpo-4"}  # also what earlier calls left
    # Measured of an adapter that was trained without swap distillation, too.
    assert np.isfinite(rows["text-dpo-4"]["swap_learnt"]) and rows["text-dpo-4"]["swap_learnt"] < 0.9
    assert "| text | dpo | 4 | 1 |" in out


@pytest.mark.slow
def test_held_out_rows_without_a_banned_prompt(words, ended, capsys):
    few = ["--config.validate.rows=8", "--config.validate.batch_size=8"]
    assert main([*words, *few, "--methods=text-dpo"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("of the 8 held-out rows none is a banned prompt; raise validate.rows")
