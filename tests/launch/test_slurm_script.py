"""launch/slurm.sbatch with a SLURM that runs here: what is submitted, what a job starts, and when it is queued again.

tests/launch/test_slurm.py is about a real one.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
WORDS = [
    "psa-jax",
    "train",
    "--config=my configs/it's.py",
    '--config.note=say "hi"; $HOME `id`',
    "--workdir=/a b/ü",
    "",
]

# sbatch, srun and scontrol: each writes its words down; srun ends with the code of the test.
FAKE = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit({code} if sys.argv[0].endswith("srun") else 0)
"""


class Slurm:
    """Its commands in a folder, and what was said to them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "slurm.log"
        self.ends_with(0)

    def ends_with(self, code: int) -> None:
        """Sets the exit code of the tasks."""
        for name in ("sbatch", "srun", "scontrol"):
            path = self.folder / name
            path.write_text(FAKE.format(python=sys.executable, log=str(self.log), code=code))
            path.chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            [SCRIPT, *words], capture_output=True, text=True, env={**kept, "PATH": path, **environment}
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


SRUN = ["srun", "--kill-on-bad-exit=0", "--wait=0"]


def test_it_submits_itself_with_the_options(slurm):
    done = slurm.run("--nodes=2", "--comment=a b", "--", *WORDS)
    assert done.returncode == 0, done.stderr
    assert slurm.calls == [["sbatch", "--nodes=2", "--comment=a b", str(SCRIPT), "--restarts=50", "--", *WORDS]]


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(slurm):
    done = slurm.run("--dry-run", "--nodes=2", "--", *WORDS)
    submitted, started = map(shlex.split, done.stdout.splitlines())
    assert slurm.calls == []
    assert submitted == ["sbatch", "--nodes=2", str(SCRIPT), "--restarts=50", "--", *WORDS]
    assert started == [*SRUN, *WORDS]
    # They are what is done, also where there is no SLURM.
    slurm.run("--nodes=2", "--", *WORDS)
    slurm.run(*submitted[3:], SLURM_JOB_ID="7")
    assert slurm.calls == [submitted, started]


def test_the_options_of_the_job():
    options = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=TERM@60", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_a_job_that_ends_stays_ended(slurm, code):
    slurm.ends_with(code)
    assert slurm.run("--", *WORDS, SLURM_JOB_ID="7").returncode == code
    assert slurm.calls == [[*SRUN, *WORDS]]


def test_a_job_that_was_stopped_is_queued_again(slurm):
    slurm.ends_with(75)
    done = slurm.run("--restarts=2", "--", *WORDS, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "exit code 75: queued again" in done.stderr
    assert slurm.calls == [[*SRUN, *WORDS], ["scontrol", "requeue", "7"]]


def test_but_not_for_ever(slurm):
    slurm.ends_with(75)
    done = slurm.run("--restarts=2", "--", *WORDS, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert done.returncode == 75 and "exit code 75 after 2 restarts; not queued again" in done.stderr
    assert slurm.calls == [[*SRUN, *WORDS]]


@pytest.mark.parametrize(("words", "message"), [
    (["--nodes=2"], "no command; give one after --"),
    (["--"], "no command"),
    (["--", "psa-jax"], "no command"),
    (["--nodes", "2", "--", "psa-jax", "train"], "2 stands before --; give options of sbatch as --NAME=VALUE"),
    (["psa-jax", "train"], "psa-jax stands before --"),
    (["--", "bash", "-c", "psa-jax train"], "bash is not psa-jax; give its command after --"),
    (["--restarts=x", "--", "psa-jax", "train"], "--restarts=x: give a number"),
])  # fmt: skip
def test_wrong_usage(slurm, words, message):
    done = slurm.run(*words)
    assert done.returncode == 2 and f"slurm.sbatch: error: {message}" in done.stderr
    assert slurm.calls == []


def test_without_slurm(tmp_path):
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run([SCRIPT, "--", *WORDS], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.startswith("slurm.sbatch: error: sbatch not found;")
    assert subprocess.run([SCRIPT, "--dry-run", "--", *WORDS], env={"PATH": str(tmp_path)}).returncode == 0


def test_help():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout
