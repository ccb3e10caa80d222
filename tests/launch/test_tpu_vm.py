"""launch/tpu_vm.sh with a gcloud that runs here: what is printed is what is done, and every word arrives as typed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "tpu_vm.sh"
WORDS = ["train", "--config=my configs/it's.py:paper", '--config.note=say "hi"; $HOME `id`', "--workdir=/a b/ü\\n", ""]
ARRIVED = [*WORDS, "--coordinator=auto"]
PLACE = ["--name=pod one", "--zone=us-east5-a"]

# A worker's home is a folder here; what is told to gcloud and to psa-jax is written to a file, a line each.
GCLOUD = """#!{python}
import json, os, subprocess, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv[1:]:
    if word.startswith("--command="):
        sys.exit(subprocess.run(["sh", "-c", word.removeprefix("--command=")], cwd={home!r}).returncode)
"""
PSA_JAX = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(3)
"""


def executable(path: Path, text: str, **values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


@pytest.fixture
def worker(tmp_path):
    """Folder with the home of a worker, where the project is installed, and a gcloud that reaches it."""
    executable(tmp_path / "bin" / "gcloud", GCLOUD, log=str(tmp_path / "gcloud.log"), home=str(tmp_path / "home"))
    executable(tmp_path / "home" / "psa_jax" / ".venv" / "bin" / "psa-jax", PSA_JAX, log=str(tmp_path / "psa.log"))
    (tmp_path / "gcloud.log").touch()
    return tmp_path


def launch(worker: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{worker / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(worker)}
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment)


def calls(worker: Path) -> list[list[str]]:
    return [json.loads(line) for line in (worker / "gcloud.log").read_text().splitlines()]


def test_the_command_arrives_word_for_word(worker):
    done = launch(worker, *PLACE, "--project=p", "--no-install", "--", *WORDS)
    assert done.returncode == 3  # of the command on the worker
    assert json.loads((worker / "psa.log").read_text()) == ARRIVED
    ((*call, _),) = calls(worker)
    wanted = ["compute", "tpus", "tpu-vm", "ssh"] + ["pod one", "--zone=us-east5-a", "--worker=all", "--project=p"]
    assert call == wanted


def test_a_detached_command_goes_on_and_is_logged(worker):
    assert launch(worker, *PLACE, "--no-install", "--detach", "--", *WORDS).returncode == 0
    subprocess.run(["sh", "-c", f"for i in $(seq 100); do test -s '{worker}/psa.log' && exit 0; sleep 0.1; done; exit 1"], check=True)  # fmt: skip # noqa: E501
    assert json.loads((worker / "psa.log").read_text()) == ARRIVED
    assert (worker / "home" / "psa_jax" / "run.log").is_file()


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(worker):
    done = launch(worker, *PLACE, "--dry-run", "--python=/opt/my python", "--", *WORDS)
    assert done.returncode == 0, done.stderr
    assert calls(worker) == [] and not (worker / "psa.log").exists()
    assert sorted(path.name for path in worker.iterdir()) == ["bin", "gcloud.log", "home"]

    # Read by a shell, the printed lines are three calls of gcloud after one of tar.
    words = shlex.split(done.stdout)
    at = [i for i, word in enumerate(words) if word == "gcloud"]
    assert words[0] == "tar" and {"psa_jax", "configs", "setup.py", "constraints.txt"} <= set(words[: at[0]])
    copy, install, start = (words[i + 4 : j] for i, j in zip(at, [*at[1:], len(words)], strict=True))
    assert copy[0] == "scp" and copy[2] == "pod one:psa_jax.tar.gz" and "--worker=all" in copy
    assert install[0] == start[0] == "ssh" and "--worker=all" in install
    lines = install[-1].removeprefix("--command=").splitlines()
    assert lines[0] == "set -eu"
    assert shlex.split(lines[-4]) == ["/opt/my python", "-m", "venv", ".venv"]
    assert shlex.split(lines[-1])[1:4] == ["-m", "pip", "install"]
    assert shlex.split(lines[-1])[-3:] == ["--constraint", "$constraints", ".[tpu]"]
    assert shlex.split(start[-1].removeprefix("--command="))[-len(ARRIVED) - 1 :] == [".venv/bin/psa-jax", *ARRIVED]


def install(worker: Path, version: str) -> str:
    """All but the installation itself: a fake Python of that version stands for it. What it is asked to install."""
    pip = executable(worker / "pip", f'#!/bin/sh\necho "$@" >{worker}/pip.log\n')
    making = f"#!/bin/sh\nmkdir -p .venv/bin .venv/lib/python{version} && ln -sf {pip} .venv/bin/python\n"
    python = executable(worker / "python", making)
    kept = worker / "home" / "psa_jax.tar.gz"
    gcloud = (worker / "bin" / "gcloud").read_text()
    copying = f"\nif 'scp' in sys.argv:\n    import shutil; shutil.copy(sys.argv[5], {str(kept)!r})\n"
    (worker / "bin" / "gcloud").write_text(gcloud + copying)
    assert launch(worker, *PLACE, f"--python={python}", "--", "train").returncode == 3
    return (worker / "pip.log").read_text()


def test_the_archive_holds_what_an_installation_needs(worker):
    install(worker, "3.11")
    home = worker / "home" / "psa_jax"
    for name in (
        "setup.py",
        "constraints.txt",
        "constraints-py312.txt",
        "configs/sd15.py",
        "psa_jax/cli.py",
        "psa_jax/assets/base_model_metrics.json",
    ):
        assert (home / name).is_file(), name
    assert not any(path.is_dir() and path.name.startswith("psa_jax.") for path in worker.iterdir())  # cleaned up


@pytest.mark.parametrize(
    ("version", "file"),
    [("3.11", "constraints.txt"), ("3.12", "constraints-py312.txt"), ("3.13", "constraints-py312.txt")],
)
def test_a_worker_takes_the_constraints_of_its_python(worker, version, file):
    assert install(worker, version) == f"-m pip install --quiet --constraint {file} .[tpu]\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zone=z", "--", "train"], "no TPU; give --name=TPU"),
        (["--name=n", "--", "train"], "no zone"),
        (PLACE, "no command"),
        ([*PLACE, "train"], "unknown option train"),
    ],
)
def test_wrong_usage(worker, words, message):
    done = launch(worker, *words)
    assert done.returncode == 2 and message in done.stderr
    assert calls(worker) == []


def test_help():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout
