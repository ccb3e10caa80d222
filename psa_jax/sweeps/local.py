"""Runs the points of a sweep on this machine, some at a time, each in a process of its own."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from psa_jax.errors import STOPPED, PSAError
from psa_jax.files import read_bytes
from psa_jax.progress import duration, print_on_main
from psa_jax.sweeps.plan import LOG_FILE
from psa_jax.sweeps.points import latest_checkpoint

DONE, DIVERGED, FAILED, INTERRUPTED = "done", "diverged", "failed", "interrupted"
"""How a training ended; interrupted: with the sweep itself."""
MOST_IDLE = 3
"""Starts of a training that end with 75 and bring no new checkpoint, before it counts as failed."""
_ERROR = b"psa-jax: error: "
_LOOK = 0.05  # seconds between two looks at the processes
_TAIL = 1 << 16


class Job(NamedTuple):
    """One training: the point's name, its folder and its command."""

    name: str
    folder: Path
    words: list[str]


class Outcome(NamedTuple):
    """How a training ended, and a line about it."""

    state: str
    said: str


class _Running:
    """A training that runs.

    Args:
      slot: number of the place that it takes, from 0.
      cores: of this place; None for all.
    """

    def __init__(self, job: Job, slot: int, cores: set[int] | None):
        self.job, self.slot, self._cores = job, slot, cores
        self.began, self._idle, self._step = time.monotonic(), 0, latest_checkpoint(job.folder)
        self.process = self._start()

    def again(self) -> bool:
        """Starts it again after an exit with 75; not if that has brought nothing for some time."""
        step = latest_checkpoint(self.job.folder)
        self._idle = 0 if step > self._step else self._idle + 1
        self._step = max(step, self._step)
        if self._idle >= MOST_IDLE:
            return False
        print_on_main(f"{self.job.name}: stopped with a checkpoint of step {step}; started again")
        self.process = self._start()
        return True

    def tell(self, signals: int) -> None:
        """Passes on that the sweep got so many signals: the first one as SIGTERM, more as SIGKILL."""
        if signals > self._told:
            self._told = signals
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    def _start(self) -> subprocess.Popen:
        self._told = 0
        self.job.folder.mkdir(parents=True, exist_ok=True)
        with (self.job.folder / LOG_FILE).open("ab") as log, _on(self._cores):
            log.write(f"$ {shlex.join(self.job.words)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C must reach it only through this process, which tells it to save.
            return subprocess.Popen(
                self.job.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def run_jobs(
    jobs: Sequence[Job], at_once: int = 1, cores: int | None = None, ended: Callable[[str, Outcome], None] | None = None
) -> dict[str, Outcome]:
    """Runs all jobs. What exits with 75 is started again; others go on when one fails.

    SIGTERM and SIGINT are passed on as SIGTERM: the trainings save and end, and no other one is started.

    Args:
      jobs: the trainings.
      at_once: how many run at a time.
      cores: CPU cores of each; None: they share all.
      ended: called with name and outcome when one has ended.

    Returns:
      Name → outcome, of all jobs.

    Raises:
      PSAError: fewer cores than are asked for.
    """
    places = _places(at_once, cores)
    waiting, running, found = list(jobs), [], {}
    free, signals = list(range(at_once)), []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not signals):
            while waiting and free and not signals:
                slot = free.pop(0)
                running.append(_Running(waiting.pop(0), slot, places[slot]))
                print_on_main(f"{running[-1].job.name}: started")
            time.sleep(_LOOK)
            for each in running:  # not in the handler: one may just be starting
                each.tell(len(signals))
            for each in [each for each in running if each.process.poll() is not None]:
                outcome = _outcome(each, bool(signals))
                if outcome is not None:
                    running.remove(each)
                    free.append(each.slot)
                    found[each.job.name] = outcome
                    print_on_main(f"{each.job.name}: {outcome.said}")
                    if ended is not None:
                        ended(each.job.name, outcome)
    finally:
        for each in running:  # none, but after an error
            each.tell(1)
        for number, handler in before.items():
            signal.signal(number, handler)
    return found | {job.name: Outcome(INTERRUPTED, "not started") for job in waiting}


def _outcome(run: _Running, stopping: bool) -> Outcome | None:
    """How a process ended; None where it was started again."""
    code, log = run.process.returncode, run.job.folder / LOG_FILE
    took = duration(time.monotonic() - run.began)
    if code == 0:
        return Outcome(DONE, f"done in {took}")
    if stopping:
        return Outcome(INTERRUPTED, "stopped with the sweep")
    if code == STOPPED:
        if run.again():
            return None
        return Outcome(FAILED, f"stopped {MOST_IDLE} times without a new checkpoint; see {log}")
    reason = error_of(log)
    if code == 1 and any(run.job.folder.glob("nonfinite_*.json")):
        return Outcome(DIVERGED, f"diverged after {took}, given up: {reason}")
    how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    return Outcome(FAILED, f"failed after {took}, {how}: {reason or 'no error line'}; see {log}")


def error_of(log: Path) -> str:
    """The last error line of a log, without its beginning; empty where there is none."""
    lines = [line for line in read_bytes(log)[-_TAIL:].splitlines() if line.startswith(_ERROR)]
    return lines[-1].removeprefix(_ERROR).decode(errors="replace") if lines else ""


def _places(count: int, cores: int | None) -> list[set[int] | None]:
    """The cores of each place where a training runs at a time."""
    if cores is None:
        return [None] * count
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(here) < count * cores:
        raise PSAError(
            f"--jobs={count} of --cores={cores} are {count * cores} cores, and this process may use {len(here)}; "
            "give fewer, or leave out --cores"
        )
    return [set(here[place * cores : (place + 1) * cores]) for place in range(count)]


@contextlib.contextmanager
def _on(cores: set[int] | None):
    """Context in which a process that is started gets these cores: it inherits them from this one."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
