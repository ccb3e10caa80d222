"""Every configuration in every mode: locked, complete, what it says it is, and its full-size step can be traced."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion, abstract_model, parameter_count
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE
from psa_jax.preference.objective import Objective
from psa_jax.tools.configs import read_config
from psa_jax.training.lowered import lower_step
from psa_jax.training.optimizer import make_optimizer
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import check_batch, make_mesh

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RELEASED = ("sd15", "sd21", "sdxl")
USER_DIM = 35

CROSS, PLAIN = "CrossAttn", ""
SD2 = dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu")
MODELS = {  # UNet, text encoders, side of the latents; parameters of UNet and text encoders together
    "sd15": ({}, ({},), 64, 859_520_964 + 123_060_480),
    "sd21": (SD2, (CLIP_H,), 96, 865_910_724 + 340_387_840),
    "sdxl": (SDXL, ({}, CLIP_G | {"projection_dim": 1280}), 128, 2_567_463_684 + 123_060_480 + 694_659_840),
}


def read(name: str, mode: str):
    return read_config(f"{CONFIGS / name}.py" + (f":{mode}" if mode else ""))


@pytest.mark.parametrize("mode", ["", "dpo", "paper", "debug", "smoke"])
@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name, mode):
    config, tiny = read(name, mode), read("tiny", "")
    assert config.is_locked
    for key in ("optimizer", "objective", "adapter", "data", "mesh"):
        assert set(config[key]) == set(tiny[key]), key
    assert set(tiny) - set(config) == {"evaluate", "pretrain"} and set(config) <= set(tiny)
    make_optimizer(config.optimizer, config.steps)
    objective = Objective(**config.objective)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch(config.batch_size, mesh, config.accumulate)
    if mode in ("", "debug", "smoke"):
        adapter = config.adapter
        assert (adapter.kind, adapter.gate, adapter.tokens, adapter.mixing) == ("edit", "categories", 0, True)
        assert adapter.pooled == (name == "sdxl")
        assert (objective.loss, objective.swap_weight) == ("none", tiny.objective.swap_weight)
    elif mode == "dpo":
        assert (config.adapter.kind, config.adapter.tokens) == ("text", 4)
        assert objective.sft_weight == pytest.approx(0.1 * objective.beta)
    assert (config.steps < 10) == (mode == "smoke")


@pytest.mark.parametrize("name", RELEASED)
def test_the_published_recipe(name):
    config = read(name, "paper")
    sizes = {"kind": "published", "tokens": 1, "qk_dim": None, "hidden": None, "gate": "attention", "mixing": False}
    assert config.adapter.to_dict() == sizes | {"pooled": False}
    assert (config.objective.beta, config.objective.sft_weight, config.objective.text_dropout) == (5000.0, 0.0, 0.2)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule) == (5e-6, 500, "constant")
    assert (optimizer.weight_decay, optimizer.clip_norm, config.steps) == (1e-2, 1.0, 5000)
    assert (config.batch_size, optimizer.name) == ((128, "adafactor") if name == "sdxl" else (192, "adamw"))


@pytest.mark.parametrize("name", [*RELEASED, "tiny"])
def test_modes_that_do_not_exist(name):
    with pytest.raises(PSAError, match="no mode 'fast'"):
        read(name, "fast")


@pytest.mark.parametrize("name", RELEASED)
def test_docstrings_give_the_commands(name):
    text = (CONFIGS / f"{name}.py").read_text()
    for words in ("psa-jax encode", "psa-jax build", f"psa-jax train --config=configs/{name}.py", "To expect"):
        assert words in text, words


def full_size(name: str, dtype) -> StableDiffusion:
    """A released model without its weights."""
    unet, encoders, side, parameters = MODELS[name]
    unet = abstract_model(UNet, UNetConfig(sample_size=side, **unet))
    encoders = [abstract_model(CLIPText, CLIPTextConfig(**settings)) for settings in encoders]
    assert sum(map(parameter_count, (unet, *encoders))) == parameters
    unet, *encoders = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model) for model in (unet, *encoders)
    )
    return StableDiffusion(
        folder=Path(name),
        unet=unet,
        vae=abstract_model(VAE, VAEConfig()),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1] if len(encoders) == 2 else None,
        tokenizer=None,
        scheduler_config={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    [("sd15", "")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("sd15", "paper"), ("sd21", ""), ("sdxl", ""), ("sdxl", "paper"))
    ],
)
def test_the_full_step_can_be_traced(name, mode):
    """On eight devices, four of which divide the frozen weights; shapes alone, nothing is allocated."""
    config = read_config(
        f"{CONFIGS / name}.py" + (f":{mode}" if mode else ""), [("mesh.fsdp", "4"), ("mesh.frozen", "split")]
    )
    model, side = full_size(name, jnp.dtype(config.dtype)), MODELS[name][2]
    setup = Setup(
        model=model,
        mesh=make_mesh(config.mesh.data, config.mesh.fsdp),
        adapter=AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, **config.adapter),
        objective=Objective(**config.objective),
        optimizer=make_optimizer(config.optimizer, config.steps),
        accumulate=config.accumulate,
        remat=config.remat,
        frozen_sharding=config.mesh.frozen,
    )
    lowered = lower_step(setup, config.batch_size, side * model.vae.config.downscale)
    state, frozen, adapter = setup.abstract_state(), setup.frozen(), setup.adapter

    after, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "gradient_norm", "accuracy" if mode else "sum_swap_learnt_banned"} <= metrics.keys()
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(frozen.weights))
    total = 2 * MODELS[name][3]
    print(f"\n{name}{':' * bool(mode)}{mode}: of {total / 1e9:.2f} GB frozen weights a device holds {held / 1e9:.2f}")
    assert 0.25 * total <= held < 0.26 * total
    trained = sum(np.prod(x.shape) for x in jax.tree.leaves(state.params))
    if (name, mode) == ("sd15", "paper"):  # the published file has as many again for W_k, without effect
        assert trained == (21_924_096 - 768 * sum(width for width, _ in adapter.layers)) - 768 * (3584 - USER_DIM)
