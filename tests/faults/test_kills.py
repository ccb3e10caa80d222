"""SIGKILL at any moment: the next start goes on, and the run ends as if nothing had happened, bit for bit."""

import random
import time

import pytest
from support.training_runs import Runs, adapter, rows

from psa_jax.data.pipeline import make_pipeline
from psa_jax.data.shards import open_shards
from psa_jax.profiles.table import EmbeddingTable

STEPS = 9


SETTINGS = {"steps": STEPS, "checkpoint_every": 2, "batch_size": 2, "data.balance": "none"}


@pytest.fixture(scope="module")
def runs(run_inputs, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("kills"), *run_inputs, cheap=True, **SETTINGS)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def slow(runs, run_inputs):
    """The same with a second a step: a signal after the first reaches the run before the last."""
    slow = Runs(runs.folder, *run_inputs, cheap=True, pause=1.0, **SETTINGS)
    yield slow
    slow.end()


@pytest.fixture(scope="module")
def undisturbed(runs):
    return whole_run(runs)


def whole_run(runs: Runs):
    """Folder of a whole run, and the seconds from its first step to its end."""
    assert runs.start(runs.folder / "first").code() == 0  # fills the cache of compiled programs
    run = runs.start(runs.folder / "undisturbed")
    run.wait_for_rows(1)
    start = time.monotonic()
    assert run.code() == 0
    assert [row["step"] for row in rows(run.workdir)] == list(range(1, STEPS + 1))
    return run.workdir, time.monotonic() - start


def kill_and_go_on(runs: Runs, undisturbed, seed: int, workdir) -> int:
    """Kills a run at a moment drawn by `seed`, lets the next one end; returns the first one's exit code."""
    whole, seconds = undisturbed
    first = runs.start(workdir)
    first.wait_for_rows(1)
    time.sleep(random.Random(seed).uniform(0, seconds))
    first.process.kill()
    code = first.code()
    second = runs.start(workdir)
    assert second.code() == 0, second.output
    assert rows(workdir) == rows(whole)
    assert adapter(workdir) == adapter(whole)
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {path.name for path in (whole / "checkpoints").iterdir()}  # and nothing half written
    return code


def test_five_kills(runs, undisturbed, tmp_path):
    codes = [kill_and_go_on(runs, undisturbed, seed, tmp_path / str(seed)) for seed in range(5)]
    assert set(codes) <= {-9, 0} and -9 in codes  # one may have ended before


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills(run_inputs, tmp_path):
    """With the real loss."""
    runs = Runs(tmp_path, *run_inputs, **SETTINGS)
    undisturbed = whole_run(runs)
    codes = [kill_and_go_on(runs, undisturbed, seed, tmp_path / str(seed)) for seed in range(100, 150)]
    print(f"{codes.count(-9)} of 50 runs were killed before their end")
    assert set(codes) <= {-9, 0} and codes.count(-9) >= 35


def test_a_loss_that_is_not_finite_ends_the_run(runs, run_inputs, tmp_path):
    """From the second step on: the first has a learning rate of 0."""
    run = runs.start(tmp_path, optimizer__learning_rate=1e38, checkpoint_every=1)
    assert run.code() == 1
    assert run.error.startswith("step 2: update_norm is inf; the rows of its batch are in ")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    data = run_inputs[1]
    batches = make_pipeline(
        open_shards(data / "shards", "train"),
        EmbeddingTable.load(data / "table.safetensors"),
        batch_size=2,
        seed=0,
        balance="none",
    )
    _, second = next(iterator := iter(batches)), next(iterator)
    assert (tmp_path / "nonfinite_2.json").read_text() == f'{{"step": 2, "rows": {second["row"].tolist()}}}\n'


def test_a_signal_ends_a_run_with_a_checkpoint(runs, slow, undisturbed, tmp_path):
    run = slow.start(tmp_path, checkpoint_every=1000)
    run.wait_for_rows(2)
    run.process.terminate()
    assert run.code() == 75
    step = rows(tmp_path)[-1]["step"]
    assert run.error == f"stopped by a signal after step {step}, with a checkpoint; run again to go on"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    assert runs.start(tmp_path).code() == 0
    assert rows(tmp_path) == rows(undisturbed[0]) and adapter(tmp_path) == adapter(undisturbed[0])


def test_a_full_disk_is_one_line_and_loses_nothing(runs, slow, undisturbed, tmp_path):
    """A limit on the size of files stands for it: metrics fit into the room that there is, arrays do not."""
    first = slow.start(tmp_path, checkpoint_every=1000)
    first.wait_for_rows(1)
    first.process.terminate()
    assert first.code() == 75
    (saved,) = (tmp_path / "checkpoints").iterdir()
    run = runs.start(tmp_path, checkpoint_every=1000, file_size=40_000)
    assert run.code() == 1
    assert "a checkpoint could not be written" in run.error and "make room and run again" in run.error
    assert saved.is_dir() and not (tmp_path / "psa_adapter.safetensors").exists()
    assert runs.start(tmp_path).code() == 0
    assert rows(tmp_path) == rows(undisturbed[0]) and adapter(tmp_path) == adapter(undisturbed[0])
