"""A small random base model with SAGE-mini made ready for it: what a training run needs, in seconds."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.torch_adapters import random_adapter

from psa_jax.interop.native import adapter_arrays
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.prepare import prepare
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import UNet
from psa_jax.preference.objective import Objective
from psa_jax.tools.configs import read_config
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import by_rows, make_mesh
from psa_jax.training.step import make_step

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"


@pytest.fixture(scope="session")
def small_pipeline(smallest_pipeline):
    """In the tests of training, which compile a step for most of them."""
    return smallest_pipeline


@pytest.fixture(scope="session")
def training_data(small_pipeline, tmp_path_factory) -> Path:
    """Folder with shards and table of 40 train users, fewer of whom do not balance, with a fifth of their rows."""
    folder = tmp_path_factory.mktemp("mini")
    render_mini(folder / "sage", 40, 3)
    for path in (folder / "sage").glob("*/metadata.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for number, line in enumerate(lines) if number // 2 % 5 == 0))  # whole pairs
    prepare(folder, small_pipeline[1], users=40, seed=3, resolution=32, splits=("train", "val"))
    return folder


@pytest.fixture
def training_config(small_pipeline, training_data):
    """Returns a function: overrides by key -> the smoke configuration on the small model."""

    def make(**overrides):
        values = {
            "model": str(small_pipeline[1].folder),
            "data.shards": str(training_data / "shards"),
            "data.table": str(training_data / "table.safetensors"),
            "data.mini.users": "0",
            **{key: str(value) for key, value in overrides.items()},
        }
        return read_config(f"{CONFIG}:dpo-smoke", list(values.items()))

    return make


class Training(NamedTuple):
    """A set-up, its step and what that takes."""

    setup: Setup
    step: Any
    state: Any
    frozen: Any
    batch: dict[str, jax.Array]
    key: jax.Array

    def run(self, steps: int) -> tuple[list[dict[str, float]], Any]:
        """Metrics of each step and the last state."""
        state, history = self.state, []
        for _ in range(steps):
            state, metrics = self.step(state, self.frozen, self.batch, self.key)
            history.append({name: float(value) for name, value in metrics.items()})
        return history, state


# Compiled for every mesh and option: one resolution, and one stack of two transformer blocks.
UNET = UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(32,),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
    transformer_layers_per_block=(2,),
    norm_num_groups=8,
)


@pytest.fixture(scope="session")
def make_training(small_pipeline):
    """Returns a function: mesh and options of `Setup` -> a `Training` on the first of the same 32 pairs."""
    model = dataclasses.replace(small_pipeline[1], unet=UNet(UNET, rngs=nnx.Rngs(0)))
    rng, most, user_dim = np.random.default_rng(0), 32, 5
    side, channels = UNET.sample_size, model.vae.config.latent_channels
    batch = {
        "chosen": rng.normal(size=(most, side, side, 2 * channels)).astype(np.float32),
        "rejected": rng.normal(size=(most, side, side, 2 * channels)).astype(np.float32),
        "input_ids": model.tokenize([f"a cat number {i}" for i in range(most)]),
        "user": rng.normal(size=(most, user_dim)).astype(np.float32),
        "banned": np.arange(most) % 2 == 0,
        "unsafe": np.arange(most) % 3 > 0,
        "safe_input_ids": model.tokenize([f"the cat number {i + 1}" for i in range(most)]),
        "twin": np.ones(most, bool),
    }

    # A random model's errors are near 2, so a large β would magnify the last digit of float32 past any tolerance.
    mild = Objective(beta=20.0, sft_weight=2.0, text_dropout=0.2)

    def make(data=1, fsdp=1, *, objective=mild, optimizer=None, trained=False, dtype=jnp.float32, pairs=8, **options):
        cast = {n: jax.tree.map(lambda x: x.astype(dtype), getattr(model, n)) for n in ("unet", "text_encoder")}
        setup = Setup(
            model=dataclasses.replace(model, **cast),
            mesh=make_mesh(data, fsdp),
            adapter=AdapterConfig.for_unet(model.unet.config, user_dim=user_dim),
            objective=objective,
            optimizer=optax.adamw(3e-3) if optimizer is None else optimizer,
            **options,
        )
        state = setup.init_state(0)
        if trained:
            params = adapter_arrays(random_adapter(setup.adapter))
            state = state._replace(params=jax.device_put(params, setup.state_sharding.params))
        taken = {name: batch[name][:pairs] for name in setup.batch.pair_columns}
        rows = jax.device_put(taken, by_rows(setup.mesh))
        shared = setup.shared_arrays()
        return Training(setup, make_step(setup), state, setup.frozen(), rows | shared, setup.key(1))

    return make
