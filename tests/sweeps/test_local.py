"""Processes of a local sweep: several at a time, started again after 75, given up where nothing moves."""

import os
import signal
import sys
import threading
import time

import pytest

from psa_jax.errors import PSAError
from psa_jax.sweeps.local import MOST_IDLE, Job, error_of, run_jobs


def job(folder, name: str, code: str) -> Job:
    return Job(name, folder / name, [sys.executable, "-c", code])


def test_each_has_a_log_and_none_stops_the_others(tmp_path, capsys):
    jobs = [
        job(tmp_path, "good", "print('fine')"),
        job(tmp_path, "bad", "import sys; print('psa-jax: error: no room', file=sys.stderr); sys.exit(1)"),
        job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
        job(tmp_path, "last", ""),
    ]
    ended = []
    found = run_jobs(jobs, ended=lambda name, outcome: ended.append(name))
    assert [found[each.name].state for each in jobs] == ["done", "failed", "failed", "done"]
    assert ended == [each.name for each in jobs]
    assert "exit code 1: no room; see " in found["bad"].said and "killed by signal 9" in found["killed"].said
    first, second = (tmp_path / "good" / "log.txt").read_text().splitlines()
    assert first.startswith(f"$ {sys.executable} -c ") and second == "fine"
    assert "psa-jax: bad: failed after 0:0" in capsys.readouterr().err


def test_as_many_at_a_time_as_asked_for(tmp_path):
    """Two wait for each other; the third begins when one of them has ended."""
    code = (
        "import pathlib, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / '{0}.there').touch()\n"
        "end = time.monotonic() + 20\n"
        "while not (here / '{1}.there').exists() and time.monotonic() < end: time.sleep(0.01)\n"
        "assert (here / '{1}.there').exists() and not (here / 'c.there').exists()\n"
        "time.sleep(0.3)\n"
    )
    jobs = [job(tmp_path, one, code.format(one, other)) for one, other in (("a", "b"), ("b", "a"))]
    found = run_jobs([*jobs, job(tmp_path, "c", f"open({str(tmp_path / 'c.there')!r}, 'w')")], at_once=2)
    assert {name: outcome.state for name, outcome in found.items()} == dict.fromkeys("abc", "done")


AGAIN = """
import pathlib, sys
here = pathlib.Path({folder!r})
count = len(list(here.glob("try*")))
(here / f"try{{count}}").touch()
if {moves}:
    (here / "checkpoints" / str(count + 1)).mkdir(parents=True)
sys.exit(75 if count < {times} else 0)
"""


@pytest.mark.parametrize(("moves", "times", "state", "tries"), [
    (False, 1, "done", 2),
    (True, 5, "done", 6),  # each brings a checkpoint: it may be stopped as often as it likes
    (False, 9, "failed", MOST_IDLE),
])  # fmt: skip
def test_75_starts_it_again(tmp_path, capsys, moves, times, state, tries):
    code = AGAIN.format(folder=str(tmp_path / "a"), moves=moves, times=times)
    outcome = run_jobs([job(tmp_path, "a", code)])["a"]
    assert outcome.state == state and len(list((tmp_path / "a").glob("try*"))) == tries
    assert capsys.readouterr().err.count("started again") == tries - 1
    assert (tmp_path / "a" / "log.txt").read_text().count("$ ") == tries


def test_a_signal_is_passed_on_and_nothing_else_begins(tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        log = tmp_path / "a" / "log.txt"
        while not log.exists() or b"\nwaiting" not in log.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    found = run_jobs([job(tmp_path, "a", code), job(tmp_path, "b", "")])
    assert {name: outcome.state for name, outcome in found.items()} == {"a": "interrupted", "b": "interrupted"}
    assert not (tmp_path / "b").exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to a core")
def test_cores(tmp_path):
    here = sorted(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    assert run_jobs([job(tmp_path, "a", code)], cores=1)["a"].state == "done"
    assert (tmp_path / "a" / "log.txt").read_text().splitlines()[-1] == str(here[:1])
    assert sorted(os.sched_getaffinity(0)) == here
    with pytest.raises(
        PSAError, match=rf"--jobs=3 of --cores={len(here)} are {3 * len(here)} cores, and this process "
    ):
        run_jobs([], at_once=3, cores=len(here))


def test_the_last_error_line_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 100_000 + b"\npsa-jax: error: first\npsa-jax: error: \xff last\nmore\n")
    assert error_of(log) == "\N{REPLACEMENT CHARACTER} last"
    log.write_text("nothing\n")
    assert error_of(log) == ""
