"""The launchers that are files for others: SkyPilot's, the image's; and what a linter says of the scripts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from psa_jax.errors import STOPPED

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile."""
    text = re.sub(r"\\\n\s*", "", (LAUNCH / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path):
    # pip puts it beside Python, also where that environment is not on the PATH.
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found is not None, "pip install '.[test]' brings shellcheck"
    done = subprocess.run([found, "--shell=bash", "--severity=style", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_they_can_be_started(path: Path):
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env ")


def test_skypilot_starts_a_stopped_run_again():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    resources = task["resources"]
    assert resources["job_recovery"] == {"recover_on_exit_codes": [STOPPED], "max_restarts_on_errors": 0}
    assert resources["use_spot"] is True and resources["infra"] == "gcp"
    # A single command that the shell makes way for; its run is on what stays when the machines are gone.
    shell, *words = shlex.split(task["run"])
    assert shell == "exec" and words[:2] == [".venv/bin/psa-jax", "train"] and "--coordinator=auto" in words
    (workdir,) = (word.partition("=")[2] for word in words if word.startswith("--workdir="))
    (mounted,) = task["file_mounts"]
    assert Path(workdir).is_relative_to(mounted)


def test_skypilot_and_tpu_vms_are_set_up_alike():
    """uv, in one version, brings a Python that the constraints are of."""
    setup = yaml.safe_load((LAUNCH / "sky.yaml").read_text())["setup"]
    script = (LAUNCH / "tpu_vm.sh").read_text()
    (version,) = re.findall(r"^UV=(\S+)", script, re.M)
    assert f"uv=={version}" in setup and "--constraints=constraints-py312.txt '.[tpu]'" in setup
    assert re.findall(r"python install (\S+)", setup) == re.findall(r"^python=(\S+)", script, re.M) == ["3.12"]


def test_the_image_is_made_from_files_that_there_are():
    names = [rest.split()[:-1] for word, rest in instructions("Dockerfile") if word == "COPY" and "--from" not in rest]
    copied = {name for each in names for name in each}
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    # What setup.py reads or carries, and both constraints.
    assert copied == {
        *("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "constraints.txt", "constraints-py312.txt"),
        *("configs", "psa_jax"),
    }
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and {name for name in copied if not any(map(Path(name).match, let_in))} == set()
    assert {name for name in let_in if not list(ROOT.glob(name))} == set()


def test_the_image_runs_psa_jax_itself_and_not_as_root():
    *_, (last, entry) = found = instructions("Dockerfile")
    assert (last, entry) == ("ENTRYPOINT", '["psa-jax"]')  # without a shell, which would keep SIGTERM
    (user,) = (rest for word, rest in found if word == "USER")
    assert int(user) > 0 and any(f"--uid {user} " in rest for word, rest in found if word == "RUN")
    installing = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert len(installing) == 1 and "--constraint constraints.txt" in installing[0]


def test_the_readme_names_every_launcher():
    text = (LAUNCH / "README.md").read_text()
    assert {path.name for path in LAUNCH.iterdir() if path.is_file()} - set(re.findall(r"[\w.]+", text)) <= {
        "README.md",
        "Dockerfile.dockerignore",
    }
    assert len(text.splitlines()) <= 100  # a page
