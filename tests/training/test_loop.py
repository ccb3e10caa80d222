"""Whole runs: files, resuming bit for bit, refusing another run's checkpoint."""

import dataclasses
import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from support.torch_adapters import random_adapter

from psa_jax.data.shards import RowColumns
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import ADAPTER_FILE, read_metadata
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.mini.prepare import prepare
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training import run
from psa_jax.training.loop import train
from psa_jax.training.samples import bans_of, by_strictness, headings

STEPS = 12


@pytest.fixture(scope="module")
def settings():
    return {"steps": STEPS, "checkpoint_every": 6, "log_every": 1, "optimizer.warmup_steps": 2}


def test_a_field_that_the_objective_did_not_have_is_its_default(training_config, settings, tmp_path):
    """A checkpoint and a configuration without it; one that was saved with another value stays another run."""
    config = training_config(**settings)
    with config.unlocked():
        del config.objective.safe_weight, config.objective.snr_gamma
    train(config, tmp_path, until=1)
    about = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    saved = json.loads(about.read_text())
    assert saved["identity"]["objective"]["safe_weight"] == 1.0
    del saved["identity"]["objective"]["safe_weight"], saved["identity"]["objective"]["snr_gamma"]
    about.write_text(json.dumps(saved))
    train(training_config(**settings), tmp_path, until=2)
    with pytest.raises(PSAError, match=r"was made with objective.safe_weight = 1.0, this run has 2.0"):
        train(training_config(**settings, **{"objective.safe_weight": 2.0}), tmp_path)


@pytest.fixture
def straight(training_config, settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train(training_config(**settings), workdir)
    return workdir


def test_stopping_halfway_and_resuming_gives_the_same_bits(training_config, settings, straight, tmp_path):
    train(training_config(**settings), tmp_path, until=STEPS // 2)
    train(training_config(**settings), tmp_path)
    ours, theirs = load_file(tmp_path / ADAPTER_FILE), load_file(straight / ADAPTER_FILE)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name

    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    resumed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in resumed] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in resumed]
    assert abs(rows[0]["loss"] - math.log(2)) <= 1e-5
    assert {"step", "loss", "accuracy", "margin"} <= rows[0].keys()
    assert {"step_seconds", "data_wait_seconds", "pairs_per_second", "time"} <= rows[-1].keys()
    config = training_config(**settings)
    # 2 warm-up steps from 0; then constant, as `decay_share` says.
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx(
        [0.0, config.optimizer.learning_rate / 2, config.optimizer.learning_rate]
    )
    assert [row["examples"] for row in rows] == [config.batch_size * (step + 1) for step in range(STEPS)]
    written = json.loads((straight / "config.json").read_text())
    assert (written["seed"], written["adapter"]["kind"]) == (config.seed, config.adapter.kind)

    # A checkpoint holds no frozen weights: it is adapter + two moments + little else.
    adapter = sum(value.nbytes for value in theirs.values())
    latest = max((straight / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    assert sum(f.stat().st_size for f in latest.rglob("*") if f.is_file()) < 4 * adapter + 200_000

    metadata = read_metadata(straight / ADAPTER_FILE)
    assert metadata["kind"] == "text"
    assert metadata["steps"] == STEPS
    assert "user" not in json.dumps(metadata).replace("user_dim", "").replace("user_dropout", "")

    # A finished run that is started again changes nothing.
    before = (straight / ADAPTER_FILE).read_bytes()
    train(training_config(**settings), straight)
    assert (straight / ADAPTER_FILE).read_bytes() == before

    with pytest.raises(PSAError, match=r"was made with objective.beta = 60.0, this run has 7.0; seed = 0, this run"):
        train(training_config(**settings, **{"objective.beta": 7.0, "seed": 1}), straight)
    with pytest.raises(PSAError, match="was made with order.balance"):  # the position would mean other rows
        train(training_config(**settings, **{"data.balance": "rows"}), straight)


def test_a_step_transfers_nothing(training_config, monkeypatch, tmp_path):
    """Batches that are left on the host are an error, and not a hidden copy in every step."""
    monkeypatch.setattr(run, "to_devices", lambda sharding, names: lambda batch: {n: batch[n] for n in names})
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(training_config(steps=1, **{"optimizer.warmup_steps": 0}), tmp_path)


def test_a_divided_run_is_resumed_and_exports_the_average(training_config, tmp_path):
    """Frozen weights divided over two devices, two parts a step, bfloat16; then one device: a checkpoint fits any."""
    settings = {"steps": 2, "log_every": 1, "checkpoint_every": 1, "dtype": "bfloat16", "remat": "full"}
    settings |= {"optimizer.warmup_steps": 0, "optimizer.decay_share": 0.0, "optimizer.ema": 0.5}
    ways = {"mesh.fsdp": 2, "mesh.frozen": "split", "accumulate": 2}
    train(training_config(**settings, **ways), tmp_path, until=1)
    path = train(training_config(**settings), tmp_path)
    about = read_metadata(path)
    assert (about["ema"], about["dtype"], about["steps"]) == (0.5, "bfloat16", 2)
    with ocp.CheckpointManager((tmp_path / "checkpoints").absolute()) as manager:
        state = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    name = "psa_adapter.0.to_v_user.0.weight"
    exported = load_file(path)[name].T
    np.testing.assert_array_equal(exported, state["ema"][name])
    assert np.abs(exported - state["params"][name]).max() > 0


def test_samples_are_drawn(training_config, tmp_path):
    """On one of the two devices that train."""
    settings = {"sample_every": 1, "optimizer.warmup_steps": 0, "mesh.data": 2}
    train(training_config(steps=1, **settings), tmp_path)
    (picture,) = (tmp_path / "samples").iterdir()
    assert picture.name == "000001.png" and picture.read_bytes().startswith(b"\x89PNG")
    # Who bans what is personal data.
    assert [path.stat().st_mode & 0o777 for path in (picture.parent, picture)] == [0o700, 0o600]
    assert any((tmp_path / "tensorboard").iterdir())

    divided = training_config(steps=1, **settings | {"mesh.data": 1, "mesh.fsdp": 2, "mesh.frozen": "split"})
    with pytest.raises(PSAError, match="sample_every = 1 draws on one device"):
        train(divided, tmp_path / "divided")


def test_samples_are_for_users_from_the_least_to_the_most_strict():
    users = ["c"] * 4 + ["a"] * 4 + ["b"] * 3 + ["d"] * 2  # ban 3 of 3, 1 of 4, 1 of 2 and nothing that is unsafe
    unsafe = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    banned = np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1], bool)
    columns = RowColumns(users, np.zeros(len(users), np.int32), unsafe, banned, unsafe)
    assert by_strictness(columns, 9) == ["d", "a", "b", "c"]
    assert by_strictness(columns, 2) == ["d", "c"]


def test_samples_say_what_a_column_bans_and_not_whose_it_is():
    users = ["a", "a", "b", "b", "c"]
    columns = RowColumns(
        users, np.int32([0, 6, 0, 6, 0]), *(np.array(x, bool) for x in ([1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1] * 5))
    )
    assert bans_of(columns, ["b", "a"], np.int32([6, 0])) == [[None, False], [False, True]]
    without = dataclasses.replace(columns, categories=np.full_like(columns.categories, -1))
    assert bans_of(without, ["b", "a"], np.int32([-1])) == [[None, None]]  # own pairs without a category
    assert headings(3) == ["user 1 (bans least)", "user 2", "user 3 (bans most)"]
    assert headings(1) == ["user 1"]


def test_held_out_accuracy(training_config, tmp_path):
    """Warm-up makes the first step one of 0, after which values are known. The best checkpoint stays."""
    validate = {"validate.every": 1, "validate.rows": 11, "validate.batch_size": 4}  # 2 whole batches
    train(training_config(steps=2, checkpoint_every=1, keep_checkpoints=1, log_every=9, **validate), tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["held_out_accuracy"] == 0.5 and abs(first["held_out_loss"] - math.log(2)) <= 1e-5
    assert second["held_out_winner_gap"] < 0 == first["held_out_winner_gap"]
    best = 1 if second["held_out_accuracy"] < 0.5 else 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(best), "2"}

    with pytest.raises(PSAError, match="3 held-out rows do not fill a batch of 4; lower .* or raise validate.rows"):
        train(training_config(**{"validate.every": 1, "validate.rows": 3, "validate.batch_size": 4}), tmp_path)
    # More rows than the split has: to ask for more would not help.
    with pytest.raises(PSAError, match=r"do not fill a batch of 4000; lower validate\.batch_size$"):
        train(training_config(**{"validate.every": 1, "validate.rows": 4000, "validate.batch_size": 4000}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "moves"),
    [
        pytest.param({}, ["psa_adapter.0.to_v_user.0.weight"], marks=pytest.mark.slow),
        (
            {"adapter.kind": "edit", "adapter.tokens": 2, "adapter.pooled": True},
            [f"prompt_adapter.{name}_out.{what}" for name in ("to", "pooled") for what in ("weight", "bias")],
        ),
    ],
    ids=["text", "edit with pooled text"],
)
def test_sdxl_trains(training_config, sdxl, tmp_path, changes, moves):
    """Two text encoders, pooled text and sizes come from shards that `prepare` made."""
    model = load_stable_diffusion(sdxl[0])
    prepare(tmp_path / "data", model, users=1, seed=0, resolution=32, family="sdxl", splits=("train",))
    overrides = {
        "model": sdxl[0],
        "data.shards": tmp_path / "data" / "shards",
        "data.table": tmp_path / "data" / "table.safetensors",
        "data.balance": "none",
        "steps": 1,
        "batch_size": 2,
        "optimizer.warmup_steps": 0,
        "optimizer.decay_share": 0.0,
        "objective.sft_weight": 0.0,  # 36 of a difference that is 0 but for its last bit are no rounding of ln 2
        **changes,
    }
    config = training_config(**overrides)
    path = train(config, tmp_path / "run")
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert abs(row["loss"] - math.log(2)) <= 1e-5
    trained = load_file(path)
    for name in moves:
        assert np.abs(trained[name]).max() > 0, name
    about = read_metadata(path)
    assert about["layers"] == [list(layer) for layer in model.unet.config.cross_attentions]
    assert about.get("pooled", 0) == (24 if changes else 0)
    if changes:  # an adapter of an earlier version is no beginning for one with the edit of the pooled text
        sizes = AdapterConfig.for_unet(model.unet.config, user_dim=33, kind="edit", tokens=2)
        save_adapter(random_adapter(sizes), tmp_path / "a.safetensors", {"base_model": model.base_hash})
        with pytest.raises(PSAError, match="has pooled False and not True; set the keys of config.adapter alike"):
            train(training_config(**overrides | {"init_from": tmp_path / "a.safetensors"}), tmp_path / "next")


@pytest.fixture(scope="module")
def earlier(small_pipeline, training_data, tmp_path_factory):
    """An adapter file of the configuration's kind and sizes, with random values, and what it says of itself."""
    model, table = small_pipeline[1], EmbeddingTable.load(training_data / "table.safetensors")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=table.dim, kind="text", tokens=8)
    about = {"base_model": model.base_hash, "encoder": table.encoder, "encoder_fingerprint": table.fingerprint}
    path = tmp_path_factory.mktemp("earlier") / "a.safetensors"
    save_adapter(random_adapter(config), path, about)
    return path, config, about


def test_a_run_begins_with_an_earlier_adapter(training_config, tmp_path, earlier):
    """The learning rate of the first step is 0, so that what leaves is what came in."""
    settings = {"steps": 2, "optimizer.warmup_steps": 2, "optimizer.decay_share": 0.0, "init_from": earlier[0]}
    path = train(training_config(**settings), tmp_path, until=1)
    ours, theirs = load_file(path), load_file(earlier[0])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        ({"base_model": "0" * 64}, {}, "the adapter was trained for another base model than"),
        ({"encoder_fingerprint": "other"}, {}, "was trained with the encoder features (other), the table has"),
        ({}, {"adapter.tokens": 4}, "has tokens 8 and not 4; set the keys of config.adapter alike"),
        ({}, {"init_from": "/nowhere/a.safetensors"}, "/nowhere/a.safetensors: no such adapter file"),
    ],
)
def test_an_adapter_that_does_not_fit_is_no_beginning(training_config, tmp_path, earlier, change, settings, says):
    path, config, about = earlier
    save_adapter(random_adapter(config), tmp_path / "a.safetensors", about | change)
    with pytest.raises(PSAError) as caught:
        train(training_config(**{"init_from": tmp_path / "a.safetensors"} | settings), tmp_path / "run")
    assert says in str(caught.value) and "\n" not in str(caught.value)
