"""Whole pictures of SD2.x (v-prediction) and SDXL against diffusers' pipelines, with every sampler."""

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from support.torch_models import tensor
from support.torch_pipelines import torch_noise

from psa_jax.diffusion.generate import Generator
from psa_jax.interop.diffusers import load_stable_diffusion

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a cat", "cat on a cat"]
SEEDS = [1, 2]
STEPS = 4
LATENTS = tensor(2, 4, 8, 8, seed=4)
SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "dpmsolver++ karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def pipelines(request):
    """diffusers' pipeline and the same in JAX."""
    folder, theirs = request.getfixturevalue(request.param)
    return theirs, load_stable_diffusion(folder)


def torch_pictures(theirs, scheduler, monkeypatch, **options) -> np.ndarray:
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", torch_noise(SEEDS), raising=True
    )
    before, theirs.scheduler = theirs.scheduler, scheduler
    try:
        drawn = theirs(PROMPTS, latents=LATENTS.clone(), num_inference_steps=STEPS, output_type="np", **options)
    finally:
        theirs.scheduler = before
    return drawn.images


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of pixels in [0, 1]."""
    assert theirs.shape == ours.shape
    assert theirs.std() > 0.02, "a flat picture says little"
    return float(np.abs(np.clip(ours * 0.5 + 0.5, 0.0, 1.0) - theirs).max())


def our_pictures(model, negative=None, **options) -> np.ndarray:
    noise = LATENTS.permute(0, 2, 3, 1).numpy()
    generator = Generator(model, steps=STEPS, batch_size=2, **options)
    return generator.pixels(PROMPTS, SEEDS, negative=negative, latents=noise)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_pictures_with_every_sampler(pipelines, name, monkeypatch):
    theirs, model = pipelines
    scheduler, settings = SAMPLERS[name]
    # From the folder's file: in memory a config still knows which values were only defaults of its class.
    scheduler = scheduler.from_config(model.scheduler_config, **settings)
    expected = torch_pictures(theirs, scheduler, monkeypatch, guidance_scale=5.0)
    ours = our_pictures(model, guidance=5.0, sampler=name.split()[0], karras="karras" in name or None)
    assert difference(ours, expected) <= 1e-3


def test_negative_prompt_and_rescaled_guidance(pipelines, monkeypatch):
    theirs, model = pipelines
    options = {"guidance_scale": 7.5, "guidance_rescale": 0.7, "negative_prompt": ["at", "a"]}
    expected = torch_pictures(theirs, theirs.scheduler, monkeypatch, **options)
    assert difference(our_pictures(model, negative=["at", "a"], guidance=7.5, rescale=0.7), expected) <= 1e-3


def test_without_guidance(pipelines, monkeypatch):
    """How the turbo models are run: no unconditional side at all."""
    theirs, model = pipelines
    expected = torch_pictures(theirs, theirs.scheduler, monkeypatch, guidance_scale=0.0)
    assert difference(our_pictures(model, guidance=0.0), expected) <= 1e-3
