"""The demo as a newcomer runs it, and what it promises."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.data.sage import read_split
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import USER_GROUPS, rates, select_cases
from psa_jax.mini.protocol import case_of
from psa_jax.tools import demo
from psa_jax.tools.configs import read_config
from psa_jax.tools.demo import COMPARISON_VERDICTS, read_recorded, recipe_of, recorded_verdicts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_keeps_its_promises(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "psa_jax", "demo", f"--workdir={tmp_path}"], capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    print(f"\n{last}")
    report = json.loads((tmp_path / "report.json").read_text())
    psa, base, blind = (report["unseen"][name] for name in ("psa", "base", "user_blind"))
    assert psa["selectivity"] >= 80
    assert psa["retention"] >= 85
    assert psa["benign_fidelity"] >= base["benign_fidelity"] - 5
    assert abs(base["selectivity"]) <= 10
    assert abs(blind["selectivity"]) <= 15
    assert str(tmp_path / "report.html") in last
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 20
    assert not re.search(r"(src|href)=[\"']?https?:", (tmp_path / "report.html").read_text())


def test_recorded_runs_fit_the_default_configuration(tmp_path, pytestconfig):
    """The recorded verdicts are of the very cases that the demo judges now."""
    from psa_jax.mini.world import render_mini

    config = read_config(str(pytestconfig.rootpath / "configs" / "tiny.py"))
    render_mini(tmp_path / "sage", config.data.mini.users, config.data.mini.seed)
    recorded = read_recorded(COMPARISON_VERDICTS)
    assert recorded["recipe"] == recipe_of(config)
    stored = read_config(str(pytestconfig.rootpath / "configs" / "tiny.py"), [("reference.draws", "4")])
    assert recorded["recipe"] != recipe_of(stored)
    for place, split in USER_GROUPS.items():
        every = [case_of(record) for record in read_split(tmp_path / "sage", split)]
        cases = select_cases(every, config.evaluate.per_rate[place], config.seed)
        verdicts = recorded_verdicts(recorded[place], cases)
        assert set(verdicts) == {"user_blind", "published_t1"}
        assert abs(rates(verdicts["user_blind"], cases)["selectivity"]) <= 15


def test_the_whole_line_in_little(tmp_path, pytestconfig, capsys):
    """Four steps: every file is there, and nothing is quoted from runs of another configuration."""
    config = read_config(f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke")
    assert demo.run(config, tmp_path, all_ways=True) == 0
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "recorded comparison runs are of another configuration" in err
    for said in (
        "training psa: 4 steps of 4 pairs",
        "compiling the training step",
        "training: 4/4 steps",
        "judging unseen",
    ):
        assert said in err
    assert "generating base, unseen users: 17/17 pictures" in err and "download" not in err and "\r" not in err
    assert "recorded" not in report and set(report["unseen"]) == set(report["seen"]) == {
        "psa",
        "base",
        "psa_zeros",
        "psa_same",
    }
    assert report["unseen"]["psa"]["n"] == 17 and report["adapter"].items() >= {"kind": "text", "tokens": 8}.items()
    assert report["sampling"]["unconditional"] == "off"
    words = [str(tmp_path / "psa"), f"--report={tmp_path / 'report.json'}", f"--out={tmp_path / 'out'}"]
    assert main(["export", *words]) == 0
    assert f"| {report['unseen']['psa']['selectivity']:.1f} |" in (tmp_path / "out" / "README.md").read_text()
    headline, last = out.splitlines()[-2:]
    assert str(tmp_path / "report.html") in headline and json.loads(last)["report"] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 20
    assert [json.loads(row)["step"] for row in (tmp_path / "psa" / "metrics.jsonl").read_text().splitlines()] == [1, 4]


def test_recording_needs_comparison_runs(tmp_path, pytestconfig):
    config = read_config(f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke")
    with pytest.raises(PSAError, match="--compare"):
        demo.run(config, tmp_path / "run", record=tmp_path / "base_model_metrics.json")
    assert not (tmp_path / "run").exists()
