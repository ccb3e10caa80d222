"""Step times by a clock that the test moves."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.training.step_timer import PEAK_FLOPS, StepClock, peak_flops, step_flops


@pytest.fixture
def now(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_step_time_excludes_what_is_not_training(now):
    """Four steps of 2 s, of which 0.5 s wait for data; 7 s of checkpoint are no training."""
    clock = StepClock(8, flops=1e12, peak=1e12)
    assert clock.read() == {}
    for _ in range(4):
        with clock.data():
            now[0] += 0.5
        now[0] += 1.5
        clock.step()
    with clock.excluded():
        now[0] += 7
    expected = {"step_seconds": 2.0, "data_wait_seconds": 0.5, "pairs_per_second": 4.0, "mfu": 0.5}
    assert clock.read() == pytest.approx(expected)
    assert clock.read() == {}  # a new window
    now[0] += 5
    clock.restart()
    now[0] += 1
    clock.step()
    assert clock.read()["step_seconds"] == pytest.approx(1.0)


def test_no_mfu_where_the_peak_is_not_known(now):
    assert peak_flops() is None  # a CPU
    clock = StepClock(1)
    now[0] += 1
    clock.step()
    assert "mfu" not in clock.read()
    assert PEAK_FLOPS["TPU v4"] == 275e12


def test_flops_of_a_matrix_product():
    a, b = np.ones((32, 64), np.float32), np.ones((64, 128), np.float32)
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    assert step_flops(compiled) == pytest.approx(2 * 32 * 64 * 128, rel=0.01)
