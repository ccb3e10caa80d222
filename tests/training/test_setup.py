"""The set-up of a configuration: what it takes from it, its batches, and text states in place of a text encoder."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from psa_jax.data.model_shards import build_for_model
from psa_jax.data.pipeline import make_pipeline
from psa_jax.data.shards import INFO_FILE, open_shards
from psa_jax.diffusion.conditioning import encode_text
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import MODELS
from psa_jax.interop.native import with_arrays
from psa_jax.preference.draws import draw
from psa_jax.preference.pair_loss import pair_losses
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training.loop import train
from psa_jax.training.run import cached_text
from psa_jax.training.settings import user_dim
from psa_jax.training.setup import LEAST_MEMORY, NO_EXCESS_PRECISION, NO_SPACE_TO_BATCH, ROOM_FOR_KERNELS, Setup
from psa_jax.training.step import draw_inputs, gradient, make_step


def kinds(arrays):
    return {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}


def test_everything_comes_from_the_configuration(training_config):
    changes = {"accumulate": 2, "remat": "full", "optimizer.ema": 0.9, "reference.draws": 3, "mesh.data": 2}
    config = training_config(**changes, **{"mesh.frozen": "split", "adapter.tokens": 2})
    setup = Setup.from_config(config, user_dim=user_dim(config), abstract=MODELS)
    assert (setup.accumulate, setup.remat, setup.ema, setup.frozen_sharding) == (2, "full", 0.9, "split")
    assert dict(setup.mesh.shape) == {"data": 2, "fsdp": 1} and setup.fixed_draws.count == 3
    assert (setup.adapter.tokens, setup.adapter.user_dim) == (2, EmbeddingTable.load(Path(config.data.table)).dim)
    assert dataclasses.asdict(setup.objective) == config.objective.to_dict()
    assert setup.abstract_state().ema.keys() == setup.abstract_state().params.keys()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(setup.frozen()))


@pytest.mark.parametrize("draws", [0, 2])
def test_the_batch_is_that_of_the_pipeline(training_config, draws):
    config = training_config(**{"reference.draws": draws})
    table = EmbeddingTable.load(Path(config.data.table))
    setup = Setup.from_config(config, user_dim=table.dim, abstract=MODELS)
    made = next(iter(make_pipeline(open_shards(Path(config.data.shards), "train"), table, batch_size=4, seed=0)))
    pairs, shared = setup.batch.split(kinds(setup.batch.abstract(4, 32)))
    assert pairs == {name: kinds(made)[name] for name in setup.batch.pair_columns}
    assert ("row" in pairs) == (draws > 0)
    assert shared == kinds(setup_of_weights(training_config).shared_arrays())


def setup_of_weights(training_config, **changes) -> Setup:
    config = training_config(**changes)
    return Setup.from_config(config, user_dim=user_dim(config), abstract=("vae",))


def test_cached_text_has_the_loss_and_the_gradient_of_tokens(make_training):
    """Text states in float32, so that nothing is rounded on the way; half of the prompts dropped."""
    training = make_training(trained=True)
    setup, batch = training.setup, training.batch
    states = jax.jit(encode_text)(setup.model.text_encoders, (batch["input_ids"],)).states
    empty = jax.jit(encode_text)(setup.model.text_encoders, (batch["empty_ids"][None],)).states[0]
    cached = {name: array for name, array in batch.items() if "ids" not in name}
    cached |= {"text_states": states, "empty_states": empty}
    objective = dataclasses.replace(setup.objective, text_dropout=0.5)
    draws = draw(objective, setup.schedule, batch, jax.random.key(3))
    assert 0 < int(draws.no_text.sum()) < len(draws.no_text)
    other = dataclasses.replace(setup, cached_text=True)

    def loss(setup, params, batch):
        model = setup.frozen_model(setup.frozen())
        found = pair_losses(objective, with_arrays(setup.adapter, params), model, batch, draws)
        return jnp.mean(found.values["loss"])

    values = [
        jax.jit(jax.value_and_grad(lambda params, s=s, b=b: loss(s, params, b)))(training.state.params)
        for s, b in ((setup, batch), (other, cached))
    ]
    (ours, slope), (theirs, wanted) = values
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for name, array in wanted.items():
        np.testing.assert_allclose(slope[name], array, rtol=1e-3, atol=1e-5 * float(jnp.abs(array).max()), err_msg=name)
    held = [len(jax.tree.leaves(each.frozen().weights)) for each in (setup, other)]
    assert held[0] - held[1] == len(jax.tree.leaves(nnx.state(setup.model.text_encoders)))


def test_training_on_cached_text(training_config, small_pipeline, training_data, tmp_path, capsys):
    """Starts at ln 2 without a text encoder; says no to text of other encoders; does not use what it cannot check."""
    shards = tmp_path / "shards"
    build_for_model(
        small_pipeline[1], training_data / "sage", shards, resolution=32, family="tiny", text=True, splits=("train",)
    )
    settings = {"data.shards": shards, "steps": 2, "log_every": 1, "optimizer.warmup_steps": 0, "validate.every": 0}
    train(training_config(**settings), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss"] - math.log(2)) <= 1e-5 and rows[1]["loss"] != rows[0]["loss"]

    config, info = training_config(**settings), json.loads((shards / INFO_FILE).read_text())
    with pytest.raises(PSAError, match="text embeddings are of text encoders 000000000000, those of"):
        cached_text(config, info | {"text_fingerprint": "0" * 64})
    capsys.readouterr()
    del info["text_fingerprint"]
    assert cached_text(config, info) is None
    assert "text embeddings are not used" in capsys.readouterr().err


def test_the_size_of_a_unet(make_training):
    setup = make_training().setup
    assert setup.unet_size == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(setup.model.unet)))
    with_text = setup.unet_size + sum(leaf.size for leaf in jax.tree.leaves(nnx.state(setup.model.text_encoders)))
    assert sum(leaf.size for leaf in jax.tree.leaves(setup.frozen().weights)) == with_text


def test_the_parts_of_a_step_have_names(make_training):
    """The compiler's costs and the profiler go by them."""
    training = make_training()
    text = make_step(training.setup).lower(*training[2:]).as_text(debug_info=True)
    for scope in ("draw_inputs", "loss", "reference", "policy", "objective", "optimizer"):
        assert re.search(rf"/(jvp\(|transpose\(jvp\()?{scope}\)*/", text), scope


def test_a_step_descends_along_the_gradient(make_training):
    """Plain descent at rate 1 subtracts what `gradient` returns for the step's own inputs."""
    training = make_training(optimizer=optax.sgd(1.0), trained=True)
    setup, before = training.setup, jax.device_get(training.state.params)

    @jax.jit
    def of_step(params, frozen, batch, key):
        pairs, shared = setup.batch.split(batch)
        inputs = draw_inputs(setup, frozen, pairs, jax.random.fold_in(key, 0))
        return gradient(setup, params, frozen, inputs, shared)

    grads, losses = of_step(before, training.frozen, training.batch, training.key)
    (metrics,), state = training.run(1)
    assert float(losses.values["loss"].mean()) == pytest.approx(metrics["loss"], rel=1e-5)
    for name, wanted in grads.items():
        assert float(jnp.abs(wanted).max()) > 0, name
        given = before[name] - np.asarray(state.params[name])
        # The parameters, of size 1, round what is subtracted.
        atol = 2.0**-23 * np.abs(before[name]).max() + 1e-5 * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "options"),
    [
        ("cpu", jnp.float32, 10**6, None),
        ("cpu", jnp.float32, 860 * 10**6, LEAST_MEMORY),
        ("cpu", jnp.bfloat16, 860 * 10**6, NO_EXCESS_PRECISION | LEAST_MEMORY),
        ("gpu", jnp.float32, 860 * 10**6, None),
        ("gpu", jnp.bfloat16, 860 * 10**6, NO_EXCESS_PRECISION),
        ("tpu", jnp.float32, 860 * 10**6, NO_SPACE_TO_BATCH),
        ("tpu", jnp.bfloat16, 860 * 10**6, NO_EXCESS_PRECISION | NO_SPACE_TO_BATCH | ROOM_FOR_KERNELS),
    ],
)
def test_the_compiler_gets_only_options_that_it_knows(monkeypatch, platform, dtype, size, options):
    """XLA refuses options of another platform."""
    devices = np.array([SimpleNamespace(platform=platform, device_kind="TPU v5 lite")])
    setup = SimpleNamespace(dtype=jnp.dtype(dtype), mesh=SimpleNamespace(devices=devices), unet_size=size)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert Setup.compiler_options.fget(setup) == options
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 1))
    without = (
        {} if options is None else {name: each for name, each in options.items() if not name.startswith("xla_tpu")}
    )
    assert Setup.compiler_options.fget(setup) == (without or None)
