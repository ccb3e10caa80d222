"""A small random model and three pairs."""

import copy

import jax.numpy as jnp
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.torch_adapters import as_jax
from support.torch_models import UNETS, randomise, tensor, to_flax
from support.torch_pairs import PAIRS, PROMPTS, USER_DIM

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import UNet


@pytest.fixture(scope="module")
def world(small_pipeline, tmp_path_factory):
    """(torch pipeline, UNet, text encoder, schedule, batch), the UNet of the smallest kind: it is compiled often."""
    theirs, model = copy.copy(small_pipeline[0]), small_pipeline[1]
    theirs.unet = randomise(UNet2DConditionModel(**UNETS["mid_only"] | {"cross_attention_dim": 32}), seed=5)
    config = UNetConfig.from_json(dict(theirs.unet.config))
    unet = to_flax(lambda r: UNet(config, rngs=r), theirs.unet, tmp_path_factory.mktemp("objective_unet"))
    moments = torch.cat([tensor(2 * PAIRS, 4, 4, 4), torch.full((2 * PAIRS, 4, 4, 4), -1.0)], dim=-1)
    ids = model.tokenize(["a cat", "cat at a cat", "t", "", "at", "a"])
    batch = {
        "chosen": as_jax(3 * moments[:PAIRS]),
        "rejected": as_jax(3 * moments[PAIRS:]),
        "input_ids": jnp.asarray(ids[:PAIRS]),
        "empty_ids": jnp.asarray(ids[PAIRS]),
        "safe_input_ids": jnp.asarray(ids[[PAIRS + 1, PAIRS + 2, 2]]),
        "twin": jnp.ones(PAIRS, bool),
        "user": as_jax(tensor(PAIRS, USER_DIM, seed=1)),
        **PROMPTS,
    }
    return theirs, unet, model.text_encoder, NoiseSchedule.from_config(model.scheduler_config), batch
