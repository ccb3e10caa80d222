"""Measures training speed: time of a step, time spent waiting for data, share of the device's peak FLOP/s."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

# bf16 FLOP/s of one device as JAX counts them. Source: cloud.google.com/tpu/docs, one page a version.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


class StepClock:
    """Wall time of steps between two readings, without what is `excluded`.

    Args:
      pairs: in a step, over all processes.
      flops: of a step on one device, where its peak is known.
      peak: FLOP/s of that device.
    """

    def __init__(self, pairs: int, flops: float | None = None, peak: float | None = None):
        self._pairs, self._flops, self._peak = pairs, flops, peak
        self.restart()

    def restart(self) -> None:
        """Starts a new measurement."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def step(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Counts the time of its block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leaves the time of its block out: checkpoints, held-out accuracy, samples."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Means since the last reading, then starts a new measurement; empty where no step was counted."""
        if not self._steps:
            return {}
        seconds = (time.perf_counter() - self._start) / self._steps
        found = {
            "step_seconds": seconds,
            "data_wait_seconds": self._waited / self._steps,
            "pairs_per_second": self._pairs / seconds,
        }
        if self._flops is not None and self._peak is not None:
            found["mfu"] = self._flops / (seconds * self._peak)
        self.restart()
        return found


def peak_flops() -> float | None:
    """Peak bf16 FLOP/s of this process's device; None where it is not known, as on a CPU."""
    return PEAK_FLOPS.get(jax.local_devices()[0].device_kind)


def step_flops(compiled: Any, parts: int = 1) -> float | None:
    """FLOPs of a compiled step on one device, rematerialization included.

    Args:
      parts: that a batch is worked on in (`accumulate`): XLA counts what is in their loop once.
    """
    analysis = compiled.cost_analysis()
    return None if not analysis or "flops" not in analysis else parts * float(analysis["flops"])
