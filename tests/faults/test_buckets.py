"""Runs whose data and working folder are in a bucket, over real HTTP: killed, continued elsewhere, refused."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from support.object_server import ObjectServer, until
from support.training_runs import Runs, adapter, rows

from psa_jax.training.mirror import MARKER

SETTINGS = {"steps": 7, "checkpoint_every": 2, "batch_size": 2, "data.balance": "none"}
PLACE = "s3://bucket/runs/own"


@pytest.fixture(scope="module")
def local(run_inputs, tmp_path_factory):
    """Starts runs without a bucket."""
    runs = Runs(tmp_path_factory.mktemp("local"), *run_inputs, cheap=True, **SETTINGS)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def undisturbed(local) -> Path:
    run = local.start(local.folder / "undisturbed")
    assert run.code() == 0, run.output
    return run.workdir


@pytest.fixture
def server():
    with ObjectServer().running() as server:
        yield server


@pytest.fixture
def runs(local, server, run_inputs, tmp_path):
    """Starts runs that know the bucket; table and shards are there alone."""
    model, data = run_inputs
    for path in (data / "shards").rglob("*"):
        if path.is_file():
            server.objects[f"in/{path.relative_to(data).as_posix()}"] = path.read_bytes()
    server.objects["in/table.safetensors"] = (data / "table.safetensors").read_bytes()
    environment = server.environment() | {"PSA_JAX_CACHE": str(tmp_path / "cache")}
    runs = Runs(local.folder, model, data, cheap=True, pause=0.3, environment=environment, **SETTINGS)
    runs.settings |= {"data.shards": "s3://bucket/in/shards", "data.table": "s3://bucket/in/table.safetensors"}
    yield runs
    runs.end()


def left(server: ObjectServer, folder: Path) -> Path:
    """What the run has in the bucket, as files."""
    for key, content in server.objects.items():
        if key.startswith("runs/own/"):
            path = folder / key.removeprefix("runs/own/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_killed_and_continued_on_another_machine(runs, server, undisturbed, tmp_path):
    first = runs.start(tmp_path / "first", f"--workdir={PLACE}")
    until(lambda: f"runs/own/checkpoints/4/{MARKER}" in server.objects or not first.process.is_alive(), 120)
    first.process.kill()
    assert first.code() == -9, first.output
    assert "runs/own/psa_adapter.safetensors" not in server.objects
    shutil.rmtree(tmp_path / "cache")  # as on a machine that has never seen the run
    second = runs.start(tmp_path / "second", f"--workdir={PLACE}")
    assert second.code() == 0, second.output
    assert f"psa-jax: {PLACE}: checkpoints " in second.output and "resumed at step " in second.output
    assert json.loads(second.output.splitlines()[-1])["adapter"] == f"{PLACE}/psa_adapter.safetensors"
    found = left(server, tmp_path / "found")
    assert rows(found) == rows(undisturbed) and adapter(found) == adapter(undisturbed)
    assert checkpoints(found) == checkpoints(undisturbed)
    for path in (undisturbed / "checkpoints").rglob("metadata"):
        assert (found / path.relative_to(undisturbed)).is_file()
    assert not any(key.startswith("runs/own/data/") for key in server.objects)


def test_a_signal_leaves_a_checkpoint_in_the_bucket(runs, server, undisturbed, tmp_path):
    first = runs.start(tmp_path / "first", f"--workdir={PLACE}", checkpoint_every=1000)
    folder = tmp_path / "cache" / "runs"
    until(lambda: any(path.read_bytes().count(b"\n") >= 2 for path in folder.glob("*/own/metrics.jsonl")), 120)
    first.process.terminate()
    assert first.code() == 75
    (step,) = {key.split("/")[3] for key in server.objects if key.startswith("runs/own/checkpoints/")}
    assert first.error == f"stopped by a signal after step {step}, with a checkpoint; run again to go on"
    assert runs.start(tmp_path / "second", f"--workdir={PLACE}").code() == 0
    assert adapter(left(server, tmp_path / "found")) == adapter(undisturbed)


def test_a_bucket_that_refuses_is_said_before_the_first_step(runs, server, tmp_path):
    server.refuses = {"PUT"}
    run = runs.start(tmp_path / "log", f"--workdir={PLACE}")
    assert run.code() == 1
    assert run.error.startswith(f"{PLACE}: cannot be written: access is refused (403 Forbidden); ")
    assert "compiling" not in run.output and not any(key.startswith("runs/") for key in server.objects)


def test_a_bucket_that_refuses_later_ends_the_run(runs, server, tmp_path):
    server.puts_left = 5  # the probe, and not all of the first checkpoint
    run = runs.start(tmp_path / "log", f"--workdir={PLACE}")
    assert run.code() == 1
    assert run.error.startswith(f"{PLACE}: cannot be written: access is refused (403 Forbidden); ")
    assert not any(key.endswith(MARKER) for key in server.objects)


def group(local: Runs, run_inputs, server: ObjectServer, folder: Path, caches: tuple[str, str], **changed) -> list:
    """Two processes that train together at PLACE, each with its folder of copies; data are on the disk."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    started = []
    for index, cache in enumerate(caches):
        environment = server.environment() | {"PSA_JAX_CACHE": str(folder / cache)}
        one = Runs(local.folder, *run_inputs, cheap=True, pause=0.3, environment=environment, **SETTINGS)
        flags = [f"--coordinator={address}", "--num-processes=2", f"--process-id={index}", f"--workdir={PLACE}"]
        started.append(one.start(folder / f"log{index}", *flags, mesh__data=2, **changed))
    return started


def test_two_processes_on_one_machine_then_on_two(local, run_inputs, server, undisturbed, tmp_path):
    """One is killed, and they go on elsewhere from what the bucket has, without a disk that both see."""
    both = group(local, run_inputs, server, tmp_path, ("cache", "cache"))
    until(lambda: f"runs/own/checkpoints/2/{MARKER}" in server.objects or not both[0].process.is_alive(), 120)
    both[1].process.kill()
    assert [run.code() for run in both] == [75, -9], both[0].output
    assert both[0].error.startswith("process 0: another process is gone (")
    both = group(local, run_inputs, server, tmp_path, ("one", "other"))
    assert [run.code() for run in both] == [0, 0], both[0].output + both[1].output
    assert "resumed at step " in both[0].output
    found = left(server, tmp_path / "found")
    assert checkpoints(found) == checkpoints(undisturbed) and (found / "psa_adapter.safetensors").is_file()
    losses = [[row["loss"] for row in rows(folder)] for folder in (found, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)


def test_two_machines_draw_the_same_data(local, run_inputs, server, tmp_path):
    own = {"data__shards": "", "data__table": "", "data__mini__users": 1, "optimizer__warmup_steps": 0, "steps": 1}
    both = group(local, run_inputs, server, tmp_path, ("one", "other"), **own)
    assert [run.code() for run in both] == [0, 0], both[0].output + both[1].output
    drawn = [next((tmp_path / name / "runs").glob("*/own/data/shards")) for name in ("one", "other")]
    ours, theirs = (
        {path.relative_to(where): path.read_bytes() for path in where.rglob("*") if path.is_file()} for where in drawn
    )
    assert len(ours) > 3 and ours == theirs


def test_two_processes_and_a_bucket_that_refuses(local, run_inputs, server, tmp_path):
    server.refuses = {"PUT"}
    both = group(local, run_inputs, server, tmp_path, ("cache", "cache"))
    assert [run.code() for run in both] == [1, 1]
    assert both[0].error.startswith(f"{PLACE}: cannot be written: access is refused (403 Forbidden); ")
    assert both[1].error == both[0].error


def test_data_that_is_not_in_the_bucket(runs, server, tmp_path):
    run = runs.start(tmp_path / "log", f"--workdir={PLACE}", data__table="s3://bucket/in/none.safetensors")
    assert run.code() == 1
    assert run.error == "data.table: s3://bucket/in/none.safetensors: nothing is there; check the name"
