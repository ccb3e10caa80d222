"""Stored reference errors: draws that stay a row's own, errors as torch finds them, the loss of one that runs."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler
from flax import nnx
from safetensors.numpy import load_file
from support.torch_adapters import random_adapter

from psa_jax.data.shards import open_shards
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError, Stopped
from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.interop.diffusers import StableDiffusion, weights_hash
from psa_jax.mini.prepare import prepare
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference.draws import FixedDraws, draw_fixed, draws_of_rows, fixed_draws_or_none
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import FrozenModel, compute_reference_errors, pair_losses
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training import reference
from psa_jax.training.loop import train
from psa_jax.training.reference import reference_table
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import make_mesh

FOUR, TWO = FixedDraws(4, seed=7), FixedDraws(2, seed=1)
OBJECTIVE = Objective(beta=50.0, sft_weight=5.0, timestep_low=0.2, timestep_high=0.8)
SCHEDULE = NoiseSchedule(jnp.linspace(0.999, 0.01, 1000), "epsilon")
SIDE, CHANNELS, USER_DIM = 8, 4, 5


def rows(numbers, swapped=False) -> dict[str, jax.Array]:
    """A batch as the draws see it."""
    moments = jnp.zeros((len(numbers), SIDE, SIDE, 2 * CHANNELS), jnp.float16)
    return {
        "row": jnp.asarray(numbers, jnp.int32),
        "swapped": jnp.full(len(numbers), swapped),
        "chosen": moments,
        "rejected": moments,
    }


def draws_of(numbers, which, swapped=False, fixed_draws=FOUR, objective=OBJECTIVE):
    return draws_of_rows(fixed_draws, objective, SCHEDULE, rows(numbers, swapped), jnp.asarray(which, jnp.int32))


def test_a_draw_belongs_to_its_row():
    """It is the same in another batch and at another place, and pictures keep their noise when they change sides."""
    here, there = draws_of([3, 8, 5], [1, 0, 2]), draws_of([5, 3], [2, 1])
    for name in ("no_text", "vae_noise_w", "vae_noise_l", "noise", "timesteps"):
        both = getattr(here, name), getattr(there, name)
        np.testing.assert_array_equal(both[0][2], both[1][0])
        np.testing.assert_array_equal(both[0][0], both[1][1])
    swapped = draws_of([3, 8, 5], [1, 0, 2], swapped=True)
    np.testing.assert_array_equal(swapped.vae_noise_w, here.vae_noise_l)
    np.testing.assert_array_equal(swapped.vae_noise_l, here.vae_noise_w)
    np.testing.assert_array_equal(swapped.noise, here.noise)


def test_draws_are_standard_normal_and_all_different():
    numbers, which = np.repeat(np.arange(50), 4), np.tile(np.arange(4), 50)
    found = draws_of(numbers, which)
    drawn = (found.noise, found.vae_noise_w, found.vae_noise_l)
    noises = np.concatenate([np.asarray(x).reshape(200, -1) for x in drawn])
    assert abs(noises.mean()) < 0.01 and abs(noises.std() - 1.0) < 0.01
    correlation = np.corrcoef(noises)
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 0.5  # of 256 numbers each: 8 standard deviations
    other = draws_of(numbers, which, fixed_draws=FixedDraws(4, seed=8))
    assert np.abs(np.asarray(other.noise - found.noise)).reshape(200, -1).max(axis=1).min() > 0.1


def test_timesteps_lie_in_the_part_of_their_draw():
    found = np.asarray(draws_of(np.repeat(np.arange(100), 4), np.tile(np.arange(4), 100)).timesteps).reshape(100, 4)
    assert ((found >= 200) & (found < 800)).all()
    assert ((found - 200) // 150 == np.arange(4)).all()
    # Even within a part: each tenth of it gets a tenth of 400 within four standard deviations.
    tenths = np.bincount(((found - 200) % 150 // 15).ravel(), minlength=10)
    assert np.abs(tenths - 40).max() <= 4 * np.sqrt(400 * 0.1 * 0.9)


def test_a_step_covers_all_draws_evenly_and_drops_users_anew():
    objective = dataclasses.replace(OBJECTIVE, user_dropout=0.5, text_dropout=0.5)
    batch = rows(range(64))
    (first, numbers), (second, _) = (
        draw_fixed(FOUR, objective, SCHEDULE, batch, jax.random.key(seed)) for seed in (0, 1)
    )
    assert np.bincount(np.asarray(numbers)).tolist() == [16] * 4
    assert not np.array_equal(first.no_user, second.no_user)
    assert 16 <= int(first.no_user.sum()) <= 48
    again = draws_of_rows(FOUR, objective, SCHEDULE, batch, numbers)
    np.testing.assert_array_equal(first.noise, again.noise)
    np.testing.assert_array_equal(first.no_text, again.no_text)
    assert 16 <= int(first.no_text.sum()) <= 48


def test_loss_and_gradient_are_those_of_a_reference_that_runs(small_pipeline):
    """On the same draws, half of the pairs with an asker for whom the row's rejected picture is the better one."""
    model, pairs = small_pipeline[1], 4
    schedule = NoiseSchedule.from_config(model.scheduler_config)
    rng = np.random.default_rng(0)
    moments = jnp.asarray(rng.normal(size=(2, pairs, SIDE, SIDE, 2 * CHANNELS)), jnp.float32)
    objective = dataclasses.replace(OBJECTIVE, text_dropout=0.3)
    own = rows([11, 4, 9, 2]) | {
        "chosen": moments[0],
        "rejected": moments[1],
        "user": jnp.asarray(rng.normal(size=(pairs, USER_DIM)), jnp.float32),
        "banned": jnp.asarray([True, False, True, False]),
        "unsafe": jnp.ones(pairs, bool),
        "input_ids": jnp.asarray(model.tokenize(["a cat", "at", "cat", "a"])),
        "empty_ids": jnp.asarray(model.tokenize([""])[0]),
    }
    swapped = jnp.asarray([True, False, True, False])
    asked = own | {"swapped": swapped}
    for side, other in ((0, 1), (1, 0)):
        asked[("chosen", "rejected")[side]] = jnp.where(swapped[:, None, None, None], moments[other], moments[side])
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, tokens=2))
    base = FrozenModel(model.unet, model.text_encoders, schedule, model.vae.config)

    @jax.jit
    def errors(number):
        return compute_reference_errors(
            base, own, draws_of_rows(FOUR, objective, schedule, own, jnp.full(pairs, number))
        )

    table = jnp.stack([errors(number) for number in range(FOUR.count)], axis=1)

    @jax.jit
    def both(adapter):
        draws, number = draw_fixed(FOUR, objective, schedule, asked, jax.random.key(5))
        known = table[jnp.arange(pairs), number]
        known = jnp.where(swapped[:, None], known[:, ::-1], known)

        def loss(adapter, errors):
            found = pair_losses(objective, adapter, base, asked, draws, errors)
            return jnp.mean(found.values["loss"]), found.values

        return [nnx.value_and_grad(loss, has_aux=True)(adapter, errors) for errors in (known, None)]

    ((loss, values), gradient), ((expected, run), slope) = both(adapter)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert "colour_drift" in run and "colour_drift" not in values  # it needs the prediction itself
    for name, value in values.items():
        np.testing.assert_allclose(value, run[name], rtol=1e-4, atol=1e-4, err_msg=name)
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True)
    for ours, theirs in leaves:
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(jnp.abs(theirs).max()))


@pytest.fixture
def table_of(small_pipeline, training_data):
    """Returns a function: folder and changes → the table of the first 11 train rows."""
    model = small_pipeline[1]
    whole = open_shards(training_data / "shards", "train")
    columns = dataclasses.replace(
        whole.columns,
        **{n: getattr(whole.columns, n)[:11] for n in ("user_ids", "categories", "unsafe", "banned", "twins")},
    )

    class First(type(whole)):
        def __len__(self):
            return 11

    shards = First(whole.folder, whole.split, whole.source, columns, whole.info)
    table = EmbeddingTable.load(training_data / "table.safetensors")

    def make(folder, fixed_draws=TWO, *, devices=1, batch_size=4, between=lambda: None):
        setup = Setup(
            model=model,
            mesh=make_mesh(devices),
            adapter=AdapterConfig.for_unet(model.unet.config, user_dim=table.dim),
            objective=OBJECTIVE,
            optimizer=optax.sgd(1.0),
            fixed_draws=fixed_draws,
        )
        frozen, shared = setup.frozen(), setup.shared_arrays()
        found = reference_table(setup, frozen, shared, shards, table, folder, batch_size=batch_size, between=between)
        return np.asarray(found)

    return make, shards


def test_errors_as_in_torch(table_of, small_pipeline, tmp_path):
    make, shards = table_of
    found = make(tmp_path / "reference")
    assert found.shape == (11, 2, 2) and found.dtype == np.float32
    theirs, model = small_pipeline
    schedule, forward = (
        NoiseSchedule.from_config(model.scheduler_config),
        DDPMScheduler.from_config(theirs.scheduler.config),
    )

    def to_torch(x):
        return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)

    some = [0, 4, 10]
    raw = [shards[row] for row in some]
    batch = rows(some) | {
        side: jnp.asarray(np.stack([row[f"moments_{side}"] for row in raw])) for side in ("chosen", "rejected")
    }
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in raw]))
    states = theirs.text_encoder(ids).last_hidden_state
    for number in range(2):
        draws = draws_of_rows(TWO, OBJECTIVE, schedule, batch, jnp.full(3, number))
        noise, times = to_torch(draws.noise), torch.from_numpy(np.array(draws.timesteps))
        for side, sampled in (("chosen", draws.vae_noise_w), ("rejected", draws.vae_noise_l)):
            mean, log_variance = to_torch(batch[side]).chunk(2, dim=1)
            clean = theirs.vae.config.scaling_factor * (mean + (log_variance / 2).exp() * to_torch(sampled))
            predicted = theirs.unet(forward.add_noise(clean, noise, times), times, states).sample
            errors = ((predicted - noise) ** 2).mean(dim=(1, 2, 3)).numpy()
            np.testing.assert_allclose(found[some, number, int(side == "rejected")], errors, rtol=1e-4)


def test_a_pass_that_was_stopped_goes_on_and_is_shared(table_of, tmp_path, monkeypatch):
    """Chunks of one batch: four of two draws. A stop loses its own batch; devices and order of work change nothing."""
    make, _ = table_of
    monkeypatch.setattr(reference, "_CHUNK_BATCHES", 1)
    folder, batches = tmp_path / "reference", []

    def stop_in_the_third():
        batches.append(1)
        if len(batches) == 3:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        make(folder, between=stop_in_the_third)
    assert len(list(folder.iterdir())) == 2
    batches.clear()
    resumed = make(folder, between=lambda: batches.append(1))
    assert len(batches) == 1  # 11 rows are three batches of 4, the last filled up
    np.testing.assert_array_equal(resumed, make(tmp_path / "other", batch_size=4))
    np.testing.assert_allclose(resumed, make(tmp_path / "two", devices=2), rtol=1e-5)

    def never():
        raise AssertionError("it is there already")

    np.testing.assert_array_equal(resumed, make(folder, between=never))
    other = make(folder, FixedDraws(2, seed=2))  # other draws are other files
    assert np.abs(other - resumed).min() > 0 and len(list(folder.iterdir())) == 6

    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-3])
    with pytest.raises(PSAError, match=re.escape(f"{files[0]}: work file cannot be read")):
        make(folder), make(folder, FixedDraws(2, seed=2))


def test_training_with_stored_errors(training_config, small_pipeline, tmp_path, monkeypatch):
    """It starts at ln 2 (the stored errors are those of this very draw), learns, and resumes bit for bit.

    So does a run of an earlier version, which knew the base model by the bytes of its files.
    """
    data = tmp_path / "data"
    prepare(data, small_pipeline[1], users=2, seed=0, resolution=32, splits=("train",))
    settings = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "reference.draws": 2, "data.balance": "none"}
    settings |= {"data.shards": data / "shards", "data.table": data / "table.safetensors"}
    train(training_config(**settings), tmp_path / "straight")
    shared = {"reference.folder": tmp_path / "straight" / "reference"}
    before = sorted(path.stat().st_mtime_ns for path in shared["reference.folder"].iterdir())
    train(training_config(**settings, **shared), tmp_path / "twice", until=2)
    train(training_config(**settings, **shared), tmp_path / "twice")
    assert before == sorted(path.stat().st_mtime_ns for path in shared["reference.folder"].iterdir())
    ours, theirs = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("twice", "straight"))
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "base_hash", property(lambda model: weights_hash(model.folder)))
        train(training_config(**settings), tmp_path / "earlier", until=2)
    files = sorted((tmp_path / "earlier" / "reference").iterdir())
    assert {path.name for path in files}.isdisjoint(path.name for path in shared["reference.folder"].iterdir())
    train(training_config(**settings), tmp_path / "earlier")
    assert files == sorted((tmp_path / "earlier" / "reference").iterdir())
    old = load_file(tmp_path / "earlier" / ADAPTER_FILE)
    assert all(np.array_equal(old[name], value) for name, value in theirs.items())
    found = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert abs(found[0]["loss"] - np.log(2)) <= 1e-4
    assert abs(found[0]["winner_gap"]) <= 1e-6
    assert found[-1]["winner_gap"] < -1e-6
    assert "colour_drift" not in found[-1]
    with pytest.raises(PSAError, match=r"was made with reference.draws = 2, this run has 0"):
        train(training_config(**settings | {"reference.draws": 0}), tmp_path / "straight")


@pytest.mark.parametrize(
    ("count", "objective", "flips", "says"),
    [
        (-1, OBJECTIVE, False, "reference.draws is -1; give a number of draws"),
        (2, Objective(loss="mapo"), False, "mapo runs no reference; set it to 0"),
        (2, Objective(reference_kl_weight=1.0), False, "objective.reference_kl_weight compares predictions"),
        (2, OBJECTIVE, True, "build shards without --flips"),
    ],
)
def test_what_cannot_be_stored_is_refused(count, objective, flips, says):
    with pytest.raises(PSAError, match=re.escape(says)):
        fixed_draws_or_none(count, 0, objective, flips=flips)
    assert fixed_draws_or_none(0, 0, objective, flips=flips) is None
