"""What a scheduler is given: one command a point, by fakes that write down what they get."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from psa_jax.errors import PSAError
from psa_jax.sweeps import launchers
from psa_jax.sweeps.local import Job
from psa_jax.sweeps.plan import Point
from psa_jax.tools.sweep_arguments import LAUNCHERS

POINT = Point({"objective.beta": "30.0"})
WORDS = ["psa-jax", *launchers.train_words("tiny:dpo", [("model", "a b")], Path("runs/x"))]


def test_the_launchers_of_the_help_are_those_that_exist():
    assert list(LAUNCHERS) == ["print", "local", *launchers.SCHEDULERS]


def job(name: str, folder: Path, args: str = "") -> Job:
    return launchers.handed(name, POINT, WORDS, folder, args)


def test_words_of_each(fake):
    launch, args, folder = fake / "launch", "--time=1:00 --comment='a b' --at={name}", fake / "x"
    flags = ["--time=1:00", "--comment=a b", f"--at={POINT.label}"]
    train = ["psa-jax", "train", "--config=tiny:dpo", "--config.model=a b", "--workdir=runs/x"]
    assert train == WORDS
    slurm = [f"{launch}/slurm.sbatch", f"--job-name={POINT.label}", *flags, "--", *train]
    assert job("slurm", folder, args) == (POINT.name, folder, slurm)
    jobset = [sys.executable, f"{launch}/gke.py", "--apply", f"--name={POINT.label}", *flags, "--", *train]
    assert job("jobset", folder, args).words == jobset
    assert not folder.exists()
    with pytest.raises(PSAError, match="--launcher-args: No closing quotation; quote it as a shell would"):
        job("slurm", folder, "--comment='a")


def test_skypilot_gets_a_file_with_the_command(fake):
    words = job("sky", fake / "x", "--infra=gcp").words
    assert words[:4] == ["sky", "jobs", "launch", "--yes"]
    assert words[4:] == [f"--name={POINT.label}", "--infra=gcp", f"{fake}/x/sky.yaml"]
    task = yaml.safe_load((fake / "x" / "sky.yaml").read_text())
    assert task["resources"] == {"use_spot": True}
    assert shlex.split(task["run"]) == ["exec", ".venv/bin/psa-jax", *WORDS[1:], "--coordinator=auto"]
    (fake / "launch" / "sky.yaml").write_text("run: x\nname: psa-jax\n")
    with pytest.raises(PSAError, match="its last line is not run: COMMAND"):
        job("sky", fake / "x")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A slurm.sbatch that writes down its words and exits as the file `code` says, beside other scripts; an sbatch."""
    launch, script = tmp_path / "launch", tmp_path / "launch" / "slurm.sbatch"
    launch.mkdir()
    (tmp_path / "code").write_text("0")
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nwith open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
        "    calls.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"print('Submitted batch job 17')\nsys.exit(int(open({str(tmp_path / 'code')!r}).read()))\n"
    )
    script.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (launch / "sky.yaml").write_text("name: psa-jax\nresources:\n  use_spot: true\nrun: exec psa-jax train\n")
    monkeypatch.setattr(launchers, "LAUNCH", launch)
    return tmp_path


def test_a_point_is_handed_over_and_remembered(fake):
    launchers.require_scheduler("slurm")
    folder = fake / "w" / POINT.name
    assert launchers.hand_over(job("slurm", folder, "--time=5")) == "Submitted batch job 17"
    assert json.loads((fake / "calls").read_text()) == [f"--job-name={POINT.label}", "--time=5", "--", *WORDS]
    assert (folder / launchers.HANDED_OVER).read_text() == "Submitted batch job 17\n"


def test_a_scheduler_that_refuses(fake):
    (fake / "code").write_text("3")
    with pytest.raises(
        PSAError, match=r"^beta=30.0: .*/slurm.sbatch exited with 3: Submitted batch job 17; see what it "
    ):
        launchers.hand_over(job("slurm", fake / POINT.name))
    assert not (fake / POINT.name).exists()


def test_what_is_missing(fake, monkeypatch):
    (fake / "launch" / "slurm.sbatch").unlink()
    with pytest.raises(PSAError, match=r"--launcher=slurm needs .*slurm.sbatch, which is not there; run in a clone"):
        launchers.require_scheduler("slurm")
    monkeypatch.setenv("PATH", str(fake))
    with pytest.raises(PSAError, match=r"--launcher=slurm needs sbatch, which is not here; "):
        launchers.require_scheduler("slurm")


def test_inside_a_job_of_slurm_the_script_does_not_take_itself_for_that_job(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = [sys.executable, "-c", "import os; print('SLURM_JOB_ID' in os.environ)"]
    assert launchers.hand_over(Job("a", tmp_path / "a", words)) == "False"
