"""Where the points of a sweep are trained: one table. Schedulers get a point each, and keep the order themselves."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psa_jax
from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.sweeps.local import Job
from psa_jax.sweeps.plan import Point

LAUNCH = Path(psa_jax.__file__).resolve().parents[1] / "launch"
"""The scripts of a clone; a wheel has none."""
HANDED_OVER = "handed_over.txt"
"""In the folder of a point that a scheduler has taken: what the scheduler said."""


class Launcher(NamedTuple):
    """One scheduler.

    Attributes:
      words: before the point's command; {launch} is the folder of scripts, {name} the point's label, {args} stands for
        --launcher-args, and {file} for a copy of the script, in which the point's command is.
      script: of `LAUNCH`, which must be there.
      needs: the scheduler's own command.
    """

    words: tuple[str, ...]
    script: str
    needs: str


SCHEDULERS = {
    "slurm": Launcher(("{launch}/slurm.sbatch", "--job-name={name}", "{args}", "--"), "slurm.sbatch", "sbatch"),
    "jobset": Launcher(
        (sys.executable, "{launch}/gke.py", "--apply", "--name={name}", "{args}", "--"), "gke.py", "kubectl"
    ),
    "sky": Launcher(("sky", "jobs", "launch", "--yes", "--name={name}", "{args}", "{file}"), "sky.yaml", "sky"),
}
"""Name → how a scheduler is given a point. The other two, print and local, give it to nobody."""
HERE = (sys.executable, "-m", "psa_jax")
"""Begins a command of this package in a process of its own."""


def train_words(source: str, overrides: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    """The words after `psa-jax` that train a point."""
    return [
        "train",
        f"--config={source}",
        *(f"--config.{key}={text}" for key, text in overrides),
        f"--workdir={folder}",
    ]


def handed(name: str, point: Point, words: Sequence[str], folder: Path, launcher_args: str) -> Job:
    """What gives a point to a scheduler.

    Args:
      name: a key of `SCHEDULERS`.
      point: the point.
      words: of its command, `psa-jax` included.
      folder: of the point; made and given a file where the scheduler takes one.
      launcher_args: flags of the scheduler, as a shell would read them.

    Raises:
      PSAError: a quote that is not closed.
    """
    launcher = SCHEDULERS[name]
    try:
        flags = shlex.split(launcher_args)
    except ValueError as error:
        raise PSAError(f"--launcher-args: {error}; quote it as a shell would") from error
    given = [word for each in launcher.words for word in (flags if each == "{args}" else [each])]
    file = folder / launcher.script
    if "{file}" in given:
        folder.mkdir(parents=True, exist_ok=True)
        write(file, _with_command((LAUNCH / launcher.script).read_text(encoding="utf-8"), words))
    else:
        given += words
    for what, value in (("{launch}", LAUNCH), ("{name}", point.label), ("{file}", file)):
        given = [word.replace(what, str(value)) for word in given]
    return Job(point.name, folder, given)


def _with_command(text: str, words: Sequence[str]) -> str:
    """A task of SkyPilot with another command in its last line, `run:`."""
    above, _, line = text.rstrip().rpartition("\n")
    if not line.startswith("run: "):
        raise PSAError(f"{LAUNCH / 'sky.yaml'}: its last line is not run: COMMAND; move it there")
    # JSON's strings are YAML's.
    return f"{above}\nrun: {json.dumps(f'exec .venv/bin/{shlex.join(words)} --coordinator=auto')}\n"


def require_scheduler(name: str) -> None:
    """Raises PSAError where the scheduler's command or this project's script for it is missing."""
    launcher = SCHEDULERS[name]
    if shutil.which(launcher.needs) is None:
        raise PSAError(f"--launcher={name} needs {launcher.needs}, which is not here; run where it is installed")
    if not (LAUNCH / launcher.script).is_file():
        raise PSAError(
            f"--launcher={name} needs {LAUNCH / launcher.script}, which is not there; run in a clone of psa_jax, "
            "whose launch/ has the scripts"
        )


def hand_over(job: Job) -> str:
    """Gives a point to its scheduler.

    Args:
      job: as `handed` gives it.

    Returns:
      What the scheduler said.

    Raises:
      PSAError: the scheduler refused.
    """
    # In a job of SLURM, which a person may sit in, the script would take itself for that job.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        job.words, env=outside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode:
        last = said.splitlines()[-1] if said else "it said nothing"
        raise PSAError(
            f"{job.name}: {job.words[0]} exited with {done.returncode}: {last}; see what it wants by "
            f"{shlex.join(job.words)}"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.folder / HANDED_OVER, said + "\n")
    return said
