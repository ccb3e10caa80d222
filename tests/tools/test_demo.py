"""The demo as a newcomer runs it, and what it promises."""

import html
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.evaluation.manifest import read_manifest
from psa_jax.tools import demo
from psa_jax.tools.configs import read_config
from psa_jax.training import gates, swap


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
    assert psa["selectivity"] >= 88
    assert psa["retention"] >= 88
    assert psa["clean"] >= 85
    assert psa["benign_fidelity"] >= base["benign_fidelity"] - 5
    assert abs(base["selectivity"]) <= 10
    assert abs(blind["selectivity"]) <= 15
    assert str(tmp_path / "report.html") in last
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 20
    assert not re.search(r"(src|href)=[\"']?https?:", (tmp_path / "report.html").read_text())


@pytest.mark.timeout(900)
def test_the_whole_line_in_little(tmp_path, pytestconfig, capsys, monkeypatch):
    """Four steps: every file is there, and nothing is quoted from runs of another configuration."""
    monkeypatch.setattr(gates, "STEPS", 20)
    monkeypatch.setattr(swap, "MOST_ROWS", 16)
    config = f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke"
    words = ["--all-ways", "--config.evaluate.per_rate.harder=1", "--config.evaluate.batch_size=7"]
    words += ["--config.data.mini.users=8", "--config.data.balance=none"]  # so few cannot be balanced
    assert main(["demo", f"--config={config}", f"--workdir={tmp_path}", *words]) == 0
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
    assert report["unseen"]["psa"]["n"] == 17 and report["adapter"].items() >= {"kind": "edit", "tokens": 0}.items()
    for group in ("two", "negated", "unseen_bans", "unseen_concepts"):
        assert report[group].keys() == {"psa", "base"} and report[group]["psa"]["n"] == 3
    assert report["sampling"]["unconditional"] == "off"
    command = shlex.join(["psa-jax", "demo", f"--config={config}", f"--workdir={tmp_path}", *words])
    assert report["command"].endswith(command) and report["seeds"] == {"training": 0, "data": 1}
    assert re.match(r"\d+ × cpu \(\w+, \d+ cores\)$", report["device"])
    assert report["versions"].keys() == {"psa_jax", "jax", "jaxlib", "flax", "numpy", "Python"}
    assert html.escape(command) in (tmp_path / "report.html").read_text()
    words = [str(tmp_path / "psa"), f"--report={tmp_path / 'report.json'}", f"--out={tmp_path / 'out'}"]
    assert main(["export", *words]) == 0
    assert f"| {report['unseen']['psa']['selectivity']:.1f} |" in (tmp_path / "out" / "README.md").read_text()
    headline, last = out.splitlines()[-2:]
    assert str(tmp_path / "report.html") in headline and json.loads(last)["report"] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 20
    judged = json.loads((tmp_path / "judged" / "result.json").read_text())["judges"]["oracle"]["methods"]
    for name, rates in judged.items():  # the same pictures, read from their files
        assert rates["rates"]["suppression"][0] == pytest.approx(report["unseen"][name]["suppression"])
    assert judged.keys() == report["unseen"].keys() and report["pictures"].startswith("judged/report.html")
    kept = read_manifest(tmp_path / "pictures" / "psa")
    assert len(kept) == 17 and all(each.gate for each in kept)
    assert not any(each.gate for each in read_manifest(tmp_path / "pictures" / "base"))
    assert [json.loads(row)["step"] for row in (tmp_path / "psa" / "metrics.jsonl").read_text().splitlines()] == [1, 4]


def test_recording_needs_comparison_runs(tmp_path, pytestconfig):
    config = read_config(f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:smoke")
    with pytest.raises(PSAError, match="--compare"):
        demo.run_demo(config, tmp_path / "run", record=tmp_path / "record.json")
    assert not (tmp_path / "run").exists()


def test_the_report_has_the_command_that_was_given(monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda config, workdir, **given: seen.update(given, workdir=workdir))
    words = ["--config=tiny:smoke", "--workdir=a b", "--config.seed=3"]
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert main(["demo", *words]) == 0
    assert seen["command"] == "psa-jax demo --config=tiny:smoke '--workdir=a b' --config.seed=3"
    # A flag of XLA decides the last digits.
    monkeypatch.setenv("XLA_FLAGS", " --xla_cpu_enable_fast_math=false --xla_dump_to=")
    assert main(["demo", *words, "--compare"]) == 0
    assert seen["command"].startswith("XLA_FLAGS='--xla_cpu_enable_fast_math=false --xla_dump_to=' psa-jax demo")
    assert seen["compare"] and str(seen["workdir"]) == "a b"
