"""Signals of one process and the watchdog."""

import os
import signal
import subprocess
import sys

import pytest

from psa_jax.training.preemption import StopSignal, Watchdog


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_acts(number: int, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        assert stop.reached() and stop.reached()
        assert (
            capfd.readouterr().err
            == "psa-jax: a signal: stopping after this step, with a checkpoint; a second ends at once\n"
        )
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def watched(seconds: float, body: str) -> subprocess.CompletedProcess:
    code = f"""
import sys, time
from psa_jax.training.preemption import Watchdog
with Watchdog({seconds}) as watchdog:
    {body}
print("end")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_watchdog_ends_a_process_that_stands_still():
    found = watched(0.3, "time.sleep(0.6); watchdog.alive(7); time.sleep(20)")  # not before the first step
    assert found.returncode == 75
    (line,) = found.stderr.splitlines()[1:]
    assert line.startswith("psa-jax: error: process 0: nothing has moved for 0.3 s after step 7: ")
    assert not found.stdout


def test_the_watchdog_leaves_a_process_that_moves():
    assert watched(2, "[(watchdog.alive(i), time.sleep(0.25)) for i in range(12)]").stdout == "end\n"
    with Watchdog(0.0) as watchdog:
        watchdog.alive(1)
