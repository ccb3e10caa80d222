"""Processes on this machine that train together: the losses of one, stopped together, resumed on other devices."""

import os
import re
import shutil
import signal
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.training_runs import Run, Runs, rows

STEPS = 40
# The loss crosses 0, where a relative tolerance means nothing.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SETTINGS = {"steps": STEPS, "checkpoint_every": 5, "batch_size": 4, "data.balance": "none"}


@pytest.fixture(scope="module")
def runs(run_inputs, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("processes"), *run_inputs, cheap=True, pause=0.1, **SETTINGS)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def alone(runs) -> list[dict[str, float]]:
    """Metrics of one process with one device."""
    run = runs.start(runs.folder / "alone")
    assert run.code() == 0, run.output
    return rows(run.workdir)


@pytest.fixture(scope="module")
def real_runs(run_inputs, tmp_path_factory):
    """With the real loss."""
    settings = SETTINGS | {"steps": 6}
    runs = Runs(tmp_path_factory.mktemp("real"), *run_inputs, **settings)
    yield runs
    runs.end()


def assert_same_losses(
    found: list[dict[str, float]], alone: list[dict[str, float]], names: tuple[str, ...] = ("loss", "winner_gap")
) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in alone[: len(found)]]
    for name in names:
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in alone[: len(found)]], **TOLERANCE)


def group(runs: Runs, workdir, processes: int, **changed) -> list[Run]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return runs.group(workdir, processes, port, **changed)


def checkpoint_steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_two_processes_stopped_killed_and_hung_then_one_with_other_devices(runs, alone, tmp_path):
    """One run after the other goes on from the last checkpoint; all losses are those of one process."""
    workdir = tmp_path / "two"

    # SIGTERM to one: both save the same step.
    pair = group(runs, workdir, 2)
    pair[0].wait_for_rows(2)
    os.kill(pair[1].process.pid, signal.SIGTERM)
    assert [run.code() for run in pair] == [75, 75], pair[0].output + pair[1].output
    (stopped,) = {int(re.search(r"stopped by a signal after step (\d+), with a", run.error)[1]) for run in pair}
    assert checkpoint_steps(workdir)[-1] == stopped
    assert_same_losses(rows(workdir), alone)
    assert 2 < len(rows(workdir)) == stopped < STEPS - 4
    assert "loss" not in pair[1].output  # the first alone shows progress

    # SIGKILL to one: the other says so and ends.
    pair = group(runs, workdir, 2)
    pair[0].wait_for_rows(stopped + 2)
    pair[1].process.kill()
    assert [run.code() for run in pair] == [75, -9], pair[0].output
    assert pair[0].error.startswith("process 0: another process is gone (")

    # One that stands still: the other gives up in time.
    pair = group(runs, workdir, 2, hang_timeout=5.0)
    pair[0].wait_for_rows(stopped + 2)
    os.kill(pair[1].process.pid, signal.SIGSTOP)
    assert pair[0].code() == 75, pair[0].output
    assert re.match(r"process 0: nothing has moved for 5 s after step \d+: another process or the", pair[0].error)
    pair[1].process.kill()
    pair[1].code()

    # One process, one device; and one process, four devices.
    shutil.copytree(workdir, tmp_path / "four")
    last = checkpoint_steps(workdir)[-1]
    one, four = runs.start(workdir), runs.start(tmp_path / "four", devices=4, mesh__data=4)
    for run in (one, four):
        assert run.code() == 0, run.output
        assert f"resumed at step {last}" in run.output
        assert_same_losses(rows(run.workdir), alone)
        assert len(rows(run.workdir)) == STEPS


def test_four_processes_named_as_two_slices(runs, alone, tmp_path):
    found = group(runs, tmp_path, 4, mesh__data=2, mesh__fsdp=2, mesh__slices=2)
    assert [run.code() for run in found] == [0] * 4, "".join(run.output for run in found)
    assert_same_losses(rows(tmp_path), alone)
    assert len(rows(tmp_path)) == STEPS and checkpoint_steps(tmp_path) == [35, STEPS]


SWAP = {
    "objective__loss": "none",
    "objective__sft_weight": 0.0,
    "objective__swap_weight": 2.0,
    "adapter__kind": "edit",
    "adapter__gate": "categories",
    "adapter__tokens": 0,
    "batch_size": 8,
    "seed": 1,  # each batch has a banned prompt: else all gradients are rounding, of which AdamW makes whole steps
}


@pytest.mark.parametrize(
    ("processes", "changed"),
    [pytest.param(2, {}, marks=pytest.mark.slow), (2, SWAP), pytest.param(4, {}, marks=pytest.mark.slow)],
    ids=["2", "2-swap", "4"],
)
def test_the_real_loss(real_runs, tmp_path, processes: int, changed: dict):
    """Two pairs to a process: XLA convolves a single one otherwise, and AdamW makes ever more of the rounding."""
    pairs = {"batch_size": 2 * processes} | changed
    alone = real_runs.start(tmp_path / "alone", **pairs)
    assert alone.code() == 0, alone.output
    found = group(real_runs, tmp_path / "group", processes, **pairs)
    assert [run.code() for run in found] == [0] * processes, "".join(run.output for run in found)
    names = ("loss", "gradient_norm" if changed else "winner_gap")  # without a reference there is no gap
    assert_same_losses(rows(tmp_path / "group"), rows(tmp_path / "alone"), names)
    assert len(rows(tmp_path / "group")) == 6
    assert not changed or all(row["pairs_banned"] > 0 for row in rows(tmp_path / "alone"))


def test_the_others_wait_for_data_longer_than_for_a_collective(run_inputs, tmp_path):
    """Process 0 draws it twice as long as a collective may take, after one that has connected them."""
    own = {"data.shards": "", "data.table": "", "data.mini.users": 1, "optimizer.warmup_steps": 0, "steps": 2}
    runs = Runs(tmp_path, *run_inputs, cheap=True, slow_data=20.0, **SETTINGS | own)
    pair = group(runs, tmp_path / "run", 2)
    assert [run.code() for run in pair] == [0, 0], pair[0].output + pair[1].output
    assert len(rows(tmp_path / "run")) == 2


def test_a_group_that_does_not_use_a_process_is_refused(real_runs, tmp_path):
    for run in group(real_runs, tmp_path, 2, mesh__data=1):
        assert run.code() == 1, run.output
        assert "1 of the 2 devices, which are of 1 of the 2 processes; give mesh.data = -1 for all" in run.error


@pytest.mark.slow
def test_two_processes_store_the_reference_of_one(real_runs, tmp_path):
    """Files of the same names with the same errors, which the first process writes, and the same losses from them."""
    stored = {"reference__draws": 1, "steps": 2, "optimizer__decay_share": 0.0}
    one = real_runs.start(tmp_path / "one", **stored)
    assert one.code() == 0, one.output
    pair = group(real_runs, tmp_path / "two", 2, **stored)
    assert [run.code() for run in pair] == [0, 0], pair[0].output + pair[1].output
    assert_same_losses(rows(tmp_path / "two"), rows(tmp_path / "one"))
    ours, theirs = (
        {path.name: load_file(path)["errors"] for path in (tmp_path / name / "reference").iterdir()}
        for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, errors in theirs.items():
        np.testing.assert_allclose(ours[name], errors, rtol=1e-5)
