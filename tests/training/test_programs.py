"""Programs lowered from shapes are the programs that the commands run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from support.torch_models import FAST_COMPILE

from psa_jax.data import batched
from psa_jax.data.model_shards import build_for_model, lower_encoders
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import MODELS, abstract_model, load_stable_diffusion
from psa_jax.mini.dataset import render_mini
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.tools.configs import load_config
from psa_jax.training import reference
from psa_jax.training.aot import largest_batch
from psa_jax.training.compiled_cost import cost_of
from psa_jax.training.programs import WORKS, Asked, work_of
from psa_jax.training.settings import user_dim


def config_of(folder, *words: str):
    config, _ = load_config(["--config=tiny:dpo", f"--config.model={folder}", "--config.mesh.data=-1", *words])
    return config


def shapes(tree) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("sld", [None, "medium"])
def test_generation(smallest_pipeline, sld):
    """Of what a call gives the jitted function, and of what is lowered, all shapes and types are the same."""
    model = smallest_pipeline[1]
    config = AdapterConfig.for_unet(model.unet.config, user_dim=5)
    made = adapter_of_zeros(config) if sld is None else None
    generator, given = Generator(model, made, steps=2, batch_size=3, sld=sld), []
    generate = generator._generate
    generator._generate = lambda *inputs: given.append(inputs) or generate(*inputs)
    generator(["a cat"], [1], None if made is None else np.ones((1, 5), np.float32))
    shapes_alone = load_stable_diffusion(model.folder, abstract=MODELS)
    where = Mesh(np.asarray(jax.devices()[:1]), ("devices",))
    adapter = None if made is None else abstract_model(Adapter, config)
    absent = Generator(shapes_alone, adapter, steps=2, batch_size=3, sld=sld, devices=where)
    assert shapes(absent.lower().in_avals) == shapes((given[0], {}))


def adapter_of_zeros(config: AdapterConfig) -> Adapter:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_model(Adapter, config))


def test_a_build(smallest_pipeline, tmp_path, monkeypatch):
    """The programs that run are those that are lowered."""
    model, ran = smallest_pipeline[1], []
    render_mini(tmp_path / "sage", 8, 0)
    jitted = batched._jitted

    def recorded(function, models):
        run, weights = jitted(function, models)
        return lambda *inputs: ran.append(run.lower(*inputs).as_text()) or run(*inputs), weights

    monkeypatch.setattr(batched, "_jitted", recorded)
    devices = jax.devices()[:2]
    settings = {"resolution": 32, "family": "test", "text": True, "batch_size": 4, "splits": ("train",)}
    build_for_model(model, tmp_path / "sage", tmp_path / "out", devices=devices, **settings)
    monkeypatch.undo()
    absent = load_stable_diffusion(model.folder, abstract=MODELS)
    lowered = lower_encoders(absent, 32, 4, devices)
    assert set(ran) == {each.as_text() for each in lowered.values()} and len(lowered) == 2


def test_a_reference_pass(run_inputs, monkeypatch):
    words = ["--config.reference.draws=3", "--config.batch_size=16", "--config.accumulate=2"]
    work = work_of("reference", config_of(run_inputs[0], *words), jax.devices(), Asked(resolution=32))
    assert (work.batch_size, work.calls, work.least, work.chips) == (8, {"reference": 3}, 8, 8)
    made = []
    monkeypatch.setattr(
        "psa_jax.training.programs.make_reference_pass",
        lambda setup: made.append(setup) or reference.make_reference_pass(setup),
    )
    lowered = work.lower(8)["reference"]
    assert [setup.fixed_draws.count for setup in made] == [3]
    assert lowered.out_info.shape == (8, 2)


def test_a_step_of_all_devices(run_inputs):
    config = config_of(run_inputs[0], "--config.batch_size=16", "--config.accumulate=2")
    work = work_of("train", config, jax.devices(), Asked(resolution=32))
    assert (work.batch_size, work.least, work.chips, work.items) == (16, 16, 8, "pairs")
    other = work_of("train", config, jax.devices(), Asked(batch_size=32, resolution=32))
    assert (other.batch_size, config.batch_size) == (32, 16)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (":dpo", []),
        (":dpo", ["--config.accumulate=2"]),
        ("", []),
        (":dpo", ["--config.objective.swap_weight=1"]),
        (":dpo", ["--config.objective.sdpo_mu=0.5", "--config.objective.reference_kl_weight=1"]),
    ],
)
def test_what_devices_say_to_each_other_is_the_gradient(run_inputs, mode, words):
    """Of one step: every device keeps its pairs, and sums once the gradients, the metrics and nothing else."""
    config, _ = load_config(
        [f"--config=tiny{mode}", f"--config.model={run_inputs[0]}", "--config.mesh.data=-1", *words]
    )
    work = work_of("train", config, jax.devices(), Asked(batch_size=16, resolution=32))
    found = cost_of(work.lower(16)["train"].compile(FAST_COMPILE).as_text()).collectives
    adapter = AdapterConfig.for_unet(
        load_stable_diffusion(run_inputs[0], abstract=MODELS).unet.config, user_dim=user_dim(config), **config.adapter
    )
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract_model(Adapter, adapter)))
    assert set(found) == {"all-reduce"}
    # Scalars join them. A gate that is fitted apart has no gradient here.
    assert gradients * (0.4 if mode == "" else 1) < found["all-reduce"][1] < gradients + 400


@pytest.mark.parametrize("accumulate", [1, 2])
def test_divided_adapters_are_gathered_once(run_inputs, accumulate):
    """Of one step on 2 × 4 devices: the adapter's arrays and their gradients, and no states of a layer."""
    config = config_of(run_inputs[0], "--config.mesh.fsdp=4", f"--config.accumulate={accumulate}")
    work = work_of("train", config, jax.devices(), Asked(batch_size=16, resolution=32))
    found = cost_of(work.lower(16)["train"].compile(FAST_COMPILE).as_text()).collectives
    unet = load_stable_diffusion(run_inputs[0], abstract=MODELS).unet.config
    adapter = abstract_model(Adapter, AdapterConfig.for_unet(unet, user_dim=user_dim(config), **config.adapter))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(adapter))
    assert 0.9 * size < found.pop("all-gather")[1] <= size
    # Over four devices by parts, of which each then has a quarter; over the other two the quarters, once a step.
    if accumulate > 1:
        assert 0.9 * size < found.pop("reduce-scatter")[1] / accumulate <= size
        assert 0.25 * size < found.pop("all-reduce")[1] < 0.3 * size
    else:
        assert 1.2 * size < found.pop("all-reduce")[1] < 1.3 * size
    assert not found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_divided_weights_are_gathered_for_each_pass(run_inputs, remat):
    """Of one step on 2 × 4 devices: by reference, policy and its backward pass, and nothing is kept in between."""
    words = [f"--config.remat={remat}", "--config.mesh.fsdp=4", "--config.mesh.frozen=split"]
    work = work_of("train", config_of(run_inputs[0], *words), jax.devices(), Asked(batch_size=16, resolution=32))
    found = cost_of(work.lower(16)["train"].compile(FAST_COMPILE).as_text()).collectives
    weights = nnx.state(load_stable_diffusion(run_inputs[0], abstract=MODELS).unet)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(weights))
    assert set(found) == {"all-gather", "all-reduce"}
    assert 2.5 * size < found["all-gather"][1] < 3.5 * size


def test_pictures_are_drawn_on_one_chip_and_encoded_on_those_of_a_host(run_inputs):
    config = config_of(run_inputs[0])
    work = work_of("generate", config, jax.devices(), Asked())
    assert (work.chips, work.batch_size, work.least, work.items) == (1, 8, 1, "pictures")
    work = work_of("build", config, jax.devices(), Asked())
    assert (work.chips, work.batch_size, work.least, work.calls) == (8, 16, 8, {"vae": 2, "text_encoder": 1})


@pytest.mark.parametrize(
    ("what", "asked", "said"),
    [
        ("train", Asked(batch_size=12), "batch_size = 12 cannot be divided into accumulate = 1 parts on 8 devices"),
        ("build", Asked(batch_size=12, resolution=32), "batch size 12 cannot be divided among 8 devices"),
        ("build", Asked(resolution=31), "resolution 31 is no multiple of"),
        ("reference", Asked(), "reference.draws is 0"),
        ("generate", Asked(resolution=31), "picture size 31x31"),
    ],
)
def test_what_does_not_go(run_inputs, what, asked, said):
    with pytest.raises(PSAError, match=said):
        work = work_of(what, config_of(run_inputs[0]), jax.devices(), asked)
        work.lower(work.batch_size)


@pytest.mark.parametrize(
    ("most", "tried"),
    [
        (0, [1]),
        (1, [1, 2]),
        (5, [1, 2, 4, 8, 6, 5]),
        (7, [1, 2, 4, 8, 6, 7]),
        (16, [1, 2, 4, 8, 16, 32, 24, 20, 18, 17]),
    ],
)
def test_the_largest_batch(most, tried):
    asked = []
    assert largest_batch(lambda number: asked.append(number) or number <= most) == most
    assert asked == tried


def test_the_search_ends():
    asked = []
    assert largest_batch(lambda number: asked.append(number) or True, most=16) == 16
    assert asked == [1, 2, 4, 8, 16]


def test_every_work_is_a_choice_of_the_command():
    from psa_jax import cli

    (action,) = [each for each in cli._command_parser("aot")._actions if each.dest == "what"]
    assert action.choices == list(WORKS)
