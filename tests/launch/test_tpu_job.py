"""launch/tpu_job.sh and launch/tpu_startup.sh with a psa-jax that only ends: what is started again, and what is not."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# Ends with the codes of the plan in turn; `wait` waits for SIGTERM, which it counts, and ends with 75.
PSA_JAX = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>starts
plan=($(<plan))
code=${plan[$(($(wc -l <starts) - 1))]}
if [[ $code == wait ]]; then
  trap 'echo >>terms; exit 75' TERM
  touch waiting
  while :; do sleep 0.05; done
fi
exit "$code"
"""


class Worker:
    """A home with the project, and what happens there."""

    def __init__(self, homes: Path):
        self.homes = homes
        self.folder = homes / "ann" / "psa_jax"
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        (self.folder / "launch").mkdir()
        shutil.copy(LAUNCH / "tpu_job.sh", self.folder / "launch")
        command = self.folder / ".venv" / "bin" / "psa-jax"
        command.write_text(PSA_JAX)
        command.chmod(0o755)

    def plan(self, *codes: str) -> None:
        (self.folder / "plan").write_text(" ".join(codes))

    def job(self, *words: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PSA_JAX_PAUSE": "0.1"}
        command = [self.folder / "launch" / "tpu_job.sh", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")

    def boot(self) -> None:
        environment = os.environ | {"PSA_JAX_PAUSE": "0.1", "PSA_JAX_HOMES": str(self.homes)}
        subprocess.run([LAUNCH / "tpu_startup.sh"], env=environment, check=True, capture_output=True)

    def read(self, name: str) -> str:
        """A file's text, once there is some."""
        path = self.folder / name
        for _ in range(200):
            if path.exists() and path.read_text():
                return path.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {name}: {(self.folder / 'run.log').read_text()}")

    def wait_until(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, (self.folder / "run.log").read_text()
            time.sleep(0.05)

    @property
    def starts(self) -> list[str]:
        path = self.folder / "starts"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def free(self) -> bool:
        """Whether no job runs."""
        return subprocess.run(["flock", "--nonblock", self.folder / "job.lock", "true"]).returncode == 0


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    worker.job("stop")
    worker.wait_until(lambda: worker.free)


@pytest.mark.parametrize(("codes", "ended", "starts"), [
    (["75", "75", "0"], "0\n", 3),
    (["75", "1"], "1\n", 2),
    (["2"], "2\n", 1),
    (["139"], "139\n", 1),
])  # fmt: skip
def test_exit_code_75_starts_it_again_and_others_end_it(worker, codes, ended, starts):
    worker.plan(*codes)
    assert worker.job("start", "train", "--note=a b").returncode == 0
    assert worker.read("job.exit") == ended
    assert worker.starts == ["train --note=a b"] * starts
    worker.boot()  # what has ended stays so
    assert len(worker.starts) == starts and worker.free
    assert f"ended with exit code {ended.strip()} after start {starts}" in worker.read("run.log")


def test_a_reboot_starts_it_again(worker):
    worker.plan("wait", "0")
    worker.job("start", "train")
    worker.wait_until((worker.folder / "waiting").exists)
    # A shutdown tells every process: the loop must neither tell psa-jax once more nor start it again.
    (loop,) = [int(line) for line in pgrep(worker)]
    os.kill(loop, signal.SIGTERM)
    time.sleep(0.3)
    assert not (worker.folder / "terms").exists()
    os.kill(int(worker.read("job.pid")), signal.SIGTERM)
    worker.wait_until(lambda: worker.free)
    assert worker.read("terms") == "\n" and len(worker.starts) == 1
    assert not (worker.folder / "job.exit").exists()

    worker.boot()
    assert worker.read("job.exit") == "0\n" and len(worker.starts) == 2
    assert "the machine has started; the job goes on" in worker.read("run.log")


def pgrep(worker: Worker) -> list[str]:
    """Process ids of the loop: those whose working folder and words are its."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, folder = (path / "cmdline").read_bytes().split(b"\0"), (path / "cwd").resolve()
        except OSError:  # it has ended meanwhile
            continue
        if b"loop" in words and folder == worker.folder.resolve():
            found.append(path.name)
    return found


def test_stopping_saves_and_does_not_start_it_again(worker):
    worker.plan("wait", "0")
    worker.job("start", "train")
    worker.wait_until((worker.folder / "waiting").exists)
    assert worker.job("stop").returncode == 0
    worker.wait_until(lambda: worker.free)
    worker.boot()
    assert worker.read("terms") == "\n" and len(worker.starts) == 1 and worker.free

    worker.job("start", "train")  # but when it is told to
    assert worker.read("job.exit") == "0\n" and len(worker.starts) == 2


def test_one_job_at_a_time(worker):
    worker.plan("wait")
    worker.job("start", "train", "one")
    worker.wait_until((worker.folder / "waiting").exists)
    done = worker.job("start", "train", "two")
    assert done.returncode == 1 and "error: a job runs here already; stop it first" in done.stderr
    assert worker.read("job.words") == "train\0one\0"


def test_a_boot_without_a_job(worker, tmp_path):
    worker.boot()
    assert worker.starts == []
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PSA_JAX_HOMES": str(tmp_path / "empty")}
    assert subprocess.run([LAUNCH / "tpu_startup.sh"], env=environment).returncode == 0


def test_wrong_usage(worker):
    assert worker.job("begin").returncode == 2
