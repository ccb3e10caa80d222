"""When a run logs, measures, saves and samples: by hand for runs of a few steps."""

import pytest

from psa_jax.training.cadence import Cadence


def steps_of(answer, count: int) -> list[int]:
    return [done for done in range(1, count + 1) if answer(done)]


def cadence(**changes) -> Cadence:
    values = {"log_every": 4, "validate_every": 5, "checkpoint_every": 6, "sample_every": 7}
    return Cadence(steps=10, end=10, **values | changes)


def test_each_has_its_own_steps_and_the_last():
    ours = cadence()
    assert steps_of(ours.measures, 10) == [5, 10]
    assert steps_of(ours.logs, 10) == [1, 4, 5, 8, 10]  # and whatever is measured
    assert steps_of(lambda done: ours.saves(done, stopping=False), 10) == [6, 10]
    assert steps_of(ours.samples, 10) == [7, 10]


def test_zero_is_never():
    ours = cadence(validate_every=0, sample_every=0)
    assert steps_of(ours.measures, 10) == steps_of(ours.samples, 10) == []
    assert steps_of(ours.logs, 10) == [1, 4, 8, 10]


def test_a_run_that_ends_before_its_last_step_saves_and_does_not_measure():
    ours = cadence(log_every=4)
    stopped = Cadence(**{**ours.__dict__, "end": 3})
    assert [stopped.saves(done, stopping=False) for done in (2, 3)] == [False, True]
    assert not (stopped.measures(3) or stopped.logs(3) or stopped.samples(3))


@pytest.mark.parametrize("done", [1, 2, 9])
def test_a_signal_saves_at_any_step(done):
    assert cadence().saves(done, stopping=True) and not cadence().saves(done, stopping=False)
