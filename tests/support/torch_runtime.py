"""Drawing with psa_jax.torch in tests."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from psa_jax.profiles.encoders import get_encoder
from support.torch_models import tensor

PROMPTS = ["a cat", "cat on a cat"]
IDS = ["0000002", "0000005"]
CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
STEPS = {"num_inference_steps": 2}
ENCODER = get_encoder("features")


def open_pipeline(folder, kind=StableDiffusionPipeline):
    pipe = kind.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(count: int = 2) -> torch.Tensor:
    return tensor(2, 4, 8, 8, seed=4)[:count].clone()


def draw(psa, prompts=PROMPTS, rows=slice(None), **options) -> np.ndarray:
    return psa(prompts[rows], latents=latents()[rows], **CALL | options).images


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())
