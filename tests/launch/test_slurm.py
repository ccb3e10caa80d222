"""launch/slurm.sbatch on a real SLURM of one node, started here: a run that is stopped is queued again and goes on.

apt-get install slurm-wlm munge     # as root
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.training_runs import CONFIG, adapter, rows

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
STEPS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs only as root"),
]

# The node is called localhost, which is also where processes look for the first of them.
CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A SLURM of this machine alone, with all its files in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        about = {"host": os.uname().nodename.partition(".")[0], "cpus": os.cpu_count(), "ports": (16817, 16818)}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, **about))
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        munge = [f"--{name}-file={folder}/munge.{end}" for name, end in files.items() if name != "socket"]
        self._daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        self.wait_for(lambda: (folder / "munge.socket").exists(), 30)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "localhost")
        self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%t") == "idle", 60)

    def _daemon(self, name: str, *words: str) -> None:
        path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        with open(self.folder / f"{name}.out", "w") as out:
            process = subprocess.Popen([path, *words], stdout=out, stderr=out, env=self.environment)
        self._daemons.append(process)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment)
        return done.stdout.strip()

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "\n".join(self._outputs())
            time.sleep(0.1)

    def _outputs(self) -> list[str]:
        return [f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.out")]

    def end(self) -> None:
        """Ends jobs and daemons, also those of a test that failed."""
        if len(self._daemons) == len(DAEMONS):
            self.ask("scancel", "--user=root")
            self.wait_for(lambda: not self.ask("squeue", "-h"), 60)
        for process in reversed(self._daemons):
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.end()


class Job:
    """A training as a job of two tasks."""

    def __init__(self, slurm: Slurm, workdir: Path, inputs: tuple[Path, Path]):
        self._slurm, self.workdir = slurm, workdir
        workdir.mkdir()
        model, data = inputs
        settings = {
            "model": model,
            "data.shards": data / "shards",
            "data.table": data / "table.safetensors",
            "data.mini.users": 0,
            "data.balance": "none",
            "mesh.data": 2,
            "batch_size": 4,
            "steps": STEPS,
            "checkpoint_every": 8,
            "log_every": 1,
        }
        words = [f"--config={CONFIG}:dpo-smoke", f"--workdir={workdir / 'run'}"]
        words += [f"--config.{name}={value}" for name, value in settings.items()]
        command = [SCRIPT, "--parsable", "--ntasks=2", "--", Path(sys.executable).with_name("psa-jax"), "train", *words]
        environment = slurm.environment | {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=workdir)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def about(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self._slurm.ask("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.workdir.glob("psa-jax-*.log"))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            shown = self._slurm.ask("scontrol", "show", "job", self.number)
            failed = any(f"JobState={state}" in shown for state in ("FAILED", "CANCELLED"))
            assert time.monotonic() < end and not failed, f"{self.log}\n{shown}"
            time.sleep(0.05)

    @property
    def steps(self) -> int:
        path = self.workdir / "run" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_stopped_run_is_queued_again_and_ends_as_one_that_was_not(slurm, run_inputs, tmp_path):
    alone = Job(slurm, tmp_path / "alone", run_inputs)
    alone.wait_until(lambda: alone.about("JobState") == "COMPLETED")
    assert alone.about("Restarts") == "0" and alone.steps == STEPS, alone.log

    job = Job(slurm, tmp_path / "stopped", run_inputs)
    job.wait_until(lambda: job.steps >= 3)
    slurm.ask("scancel", "--signal=TERM", job.number)  # to the tasks, as a minute before the time limit
    job.wait_until(lambda: job.about("Restarts") == "1" and job.about("JobState") == "PENDING")
    assert 3 <= job.steps < STEPS, job.log
    assert "slurm.sbatch: exit code 75: queued again" in job.log
    assert re.search(r"stopped by a signal after step \d+, with a", job.log)

    # SLURM would wait for two minutes. At once, slurmd may refuse the job, taking its credential for that it revoked.
    slurm.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now+10")
    job.wait_until(lambda: job.about("JobState") == "COMPLETED")
    assert re.search(r"resumed at step \d+", job.log), job.log
    assert rows(job.workdir / "run") == rows(alone.workdir / "run")
    assert adapter(job.workdir / "run") == adapter(alone.workdir / "run")
