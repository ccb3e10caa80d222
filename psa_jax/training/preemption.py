"""Stops a run in good order: at a signal, in all processes at the same step; and when a step never ends."""

import os
import signal
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from psa_jax.errors import STOPPED


class StopSignal:
    """A request to stop, by SIGTERM or one SIGINT to any process; all processes see it at the same step.

    In a group, JAX's preemption service forwards SIGTERM to all processes and picks a step after which all stop. A
    second signal ends the process at once.

    Handlers can only be set in the main thread; in another thread signals keep their handlers.
    """

    def __init__(self):
        self._stop = False
        self._together = jax.process_count() > 1
        self._before: dict[int, object] = {}
        self._asked = 0

    def reached(self) -> bool:
        """Whether to stop after this step; every process must call it at every step."""
        if not self._together:
            return self._stop
        # Counted from here and not by the training step: before its first call the service believes to be at 0.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"psa-jax: a signal: stopping after this step, with a checkpoint; a second ends at once\n")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        self._stop = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()


class Watchdog:
    """Ends the process, with one line and exit code 75, when nothing has moved for some time.

    A process that hangs in a collective or in a file system cannot be interrupted from Python.

    Args:
      seconds: of patience, from the first `alive` on (compiling is not watched); 0 never ends it.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last: tuple[float, int] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self, step: int) -> None:
        """Records that a step has finished."""
        self._last = time.monotonic(), step

    def rest(self) -> None:
        """Pauses the watch until the next `alive`."""
        self._last = None

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            last = self._last
            if last is not None and time.monotonic() - last[0] > self._seconds:
                print(  # on a line of its own, below a progress bar
                    f"\npsa-jax: error: process {jax.process_index()}: nothing has moved for {self._seconds:g} s after "
                    f"step {last[1]}: another process or the file system hangs; start again: it goes on from the "
                    "last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STOPPED)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
