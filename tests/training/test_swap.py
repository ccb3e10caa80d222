"""Swap distillation in a training step: divided, accumulated and rematerialized it is the same; whole runs learn it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from psa_jax.data.shards import RowColumns, Shards
from psa_jax.errors import PSAError
from psa_jax.interop.native import to_file, with_arrays
from psa_jax.preference.objective import Objective
from psa_jax.training import gates, swap
from psa_jax.training.loop import train, with_fitted_gate
from psa_jax.training.run import prepare_run
from psa_jax.training.swap import _rows_to_measure

ALONE = Objective(loss="none", sft_weight=0.0, swap_weight=2.0, text_dropout=0.2, user_dropout=0.2)
BESIDE = Objective(beta=20.0, sft_weight=2.0, swap_weight=2.0, text_dropout=0.2)
DISTANCE = np.float32([0.1, 0.2, 0.3, 0.4])


@pytest.fixture(scope="module")
def swap_training(make_training):
    """Returns a function: options -> a `Training` whose pairs have safe prompts, on a trained adapter."""

    def make(objective=ALONE, **options):
        training = make_training(objective=objective, trained=True, **options)
        setup = training.setup
        distance = jax.device_put(DISTANCE, setup.frozen_model_sharding.swap_distance)
        return training._replace(frozen=training.frozen._replace(swap_distance=distance))

    return make


@pytest.fixture(scope="module")
def plain(swap_training):
    return {name: swap_training(objective).run(1) for name, objective in (("alone", ALONE), ("beside", BESIDE))}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alone", {"data": 2, "accumulate": 2}),
        ("alone", {"data": 1, "fsdp": 2, "frozen_sharding": "split", "remat": "full"}),
        ("beside", {"data": 2, "fsdp": 2, "accumulate": 2, "remat": "projections"}),
    ],
)
def test_neither_mesh_nor_parts_nor_remat_change_it(plain, swap_training, name, options):
    (wanted,), state = plain[name]
    (found,), other = swap_training({"alone": ALONE, "beside": BESIDE}[name], **options).run(1)
    assert found["sum_swap_learnt_banned"] != 0.0
    for key in ("loss", "gradient_norm", "sum_swap_learnt_banned", "sum_swap_learnt_safe"):
        assert found[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-5), key
    for key, value in state.params.items():
        np.testing.assert_allclose(other.params[key], value, rtol=0, atol=2e-4, err_msg=key)


RUN = {
    "objective.loss": "none",
    "objective.sft_weight": 0.0,
    "objective.swap_weight": 2.0,
    "adapter.kind": "edit",
    "validate.every": 4,
    "validate.batch_size": 4,
    "validate.rows": 8,
    "log_every": 1,
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """The unit of swap distillation is measured on few rows: programs are not optimised here."""
    monkeypatch.setattr(swap, "MOST_ROWS", 16)


def rows_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("gate", [pytest.param("attention", marks=pytest.mark.slow), "categories"])
def test_a_run_of_it_alone(training_config, tmp_path, capsys, monkeypatch, gate):
    """From shards to the file: what it learns is logged, held out as well, and a stopped run goes on with the same."""
    monkeypatch.setattr(gates, "STEPS", 5)
    values = RUN | {"adapter.gate": gate, "adapter.tokens": 0 if gate == "categories" else 2, "adapter.mixing": True}
    config = training_config(**values)
    path = train(config, tmp_path / "whole")
    err = capsys.readouterr().err
    rows = rows_of(tmp_path / "whole")
    assert any("swap_learnt_banned" in row for row in rows) and "swap learnt" in err
    assert "accuracy" not in rows[0] and {"held_out_accuracy", "held_out_swap_learnt_safe"} <= rows[-1].keys()
    assert (tmp_path / "whole" / "gate.json").exists() == (gate == "categories")
    train(config, tmp_path / "parts", until=2)
    again = train(config, tmp_path / "parts")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.timeout(900)
def test_the_gate_is_fitted_before_and_left_alone_by_the_steps(training_config, tmp_path, capsys, monkeypatch):
    from safetensors.numpy import load_file

    values = RUN | {"adapter.gate": "categories", "adapter.tokens": 0, "validate.every": 0}
    values |= {"optimizer.weight_decay": 0.5}
    monkeypatch.setattr(gates, "STEPS", 100)
    config = training_config(**values)
    trained = load_file(train(config, tmp_path / "run"))
    run = prepare_run(config, tmp_path / "again")
    fitted = to_file(with_arrays(run.setup.adapter, with_fitted_gate(run, run.setup.init_state(config.seed)).params))
    said = json.loads((tmp_path / "run" / "gate.json").read_text())
    assert f"right about {said['users']:.1f} % of what users ban" in capsys.readouterr().err
    assert said["users"] > 80 and said["own_bans"] > 80  # features have a column for each ban
    assert trained.keys() == fitted.keys()
    for name, array in trained.items():
        same = np.array_equal(array, fitted[name])
        assert same == name.startswith(("user_gate.", "prompt_gate.")), name


def test_a_split_without_safe_prompts_is_refused():
    def shards(twins: bool) -> Shards:
        columns = RowColumns(["1"] * 3, np.zeros(3, np.int32), *[np.ones(3, bool)] * 2, np.full(3, twins))
        return Shards(Path("somewhere"), "train", None, columns, {})

    with pytest.raises(PSAError, match="somewhere: objective.swap_weight needs the safe prompts"):
        _rows_to_measure(shards(False), 4)
    for size in (2, 4):
        assert _rows_to_measure(shards(True), size).tolist() == [0, 1, 2]
