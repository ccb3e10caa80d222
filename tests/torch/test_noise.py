"""The first noise of a seed is JAX's, and so is the picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from support.torch_runtime import CALL, IDS, PROMPTS, difference, open_pipeline

from psa_jax.diffusion import generate
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.native import load_adapter
from psa_jax.torch import initial_latents, load_psa
from psa_jax.torch.noise import erfinv, threefry, uniform

SEEDS = [0, 7, 2**32 - 1, 2**32 + 7, 2**64 - 1]


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [  # of the authors' own test vectors (Random123, kat_vectors: threefry2x32 20)
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry(key, counter, answer):
    x, y = threefry(key, *(np.array([word], np.uint32) for word in counter))
    assert (int(x[0]), int(y[0])) == answer


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 64), (3, 5, 7)])
def test_latents_of_seeds(shape):
    channels, height, width = shape
    ours = initial_latents(SEEDS, shape)
    theirs = np.asarray(generate.initial_latents(SEEDS, (height, width, channels))).transpose(0, 3, 1, 2)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert difference(ours.numpy(), theirs) <= 1e-6
    assert torch.equal(initial_latents(SEEDS[3:4], shape), ours[3:4])  # a row is its seed's alone


def test_every_number_that_is_drawn():
    """All 2^23 of them. The bound: four roundings of float32, which the polynomial of either side makes."""
    x = uniform(np.arange(1 << 23, dtype=np.uint32) << np.uint32(9))
    theirs = np.asarray(jax.lax.erf_inv(jnp.asarray(x)))
    assert (np.abs(erfinv(x) - theirs) <= 4 * np.spacing(np.abs(theirs))).all()


def test_pictures_are_those_of_jax(small_pipeline, sd1, files, table):
    _, model = small_pipeline
    unet, seeds = model.unet.config, [7, 2**32 + 7]
    adapter = load_adapter(files["text"], unet.cross_attentions, unet.cross_attention_dim)
    steps, guidance = CALL["num_inference_steps"], CALL["guidance_scale"]
    generator = Generator(model, adapter, steps=steps, guidance=guidance, batch_size=2)
    ours = np.clip(generator.pixels(PROMPTS, seeds, table.lookup(IDS)) * 0.5 + 0.5, 0, 1)
    height, width, channels = generator.latent_shape
    psa = load_psa(open_pipeline(sd1[0]), files["text"], table=table)
    drawn = psa(PROMPTS, user=IDS, latents=initial_latents(seeds, (channels, height, width)), **CALL).images
    assert difference(drawn, ours) <= 1e-3
    assert difference(drawn[:1], drawn[1:]) > 0.01


@pytest.mark.filterwarnings("ignore")  # of diffusers' scheduler, and of numpy about its tensors
def test_noise_of_the_steps_is_torchs_own(small_pipeline, sd1):
    """The first noise is the same; a sampler that draws more goes on with other numbers (docs/torch.md)."""
    _, model = small_pipeline
    generator = Generator(model, None, steps=3, guidance=5.0, sampler="euler-ancestral", batch_size=1)
    ours = np.clip(generator.pixels(PROMPTS[:1], [7]) * 0.5 + 0.5, 0, 1)
    height, width, channels = generator.latent_shape
    pipe = open_pipeline(sd1[0])
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    noise = initial_latents([7], (channels, height, width))
    drawn = pipe(PROMPTS[:1], latents=noise, generator=torch.Generator().manual_seed(7), **CALL).images
    assert difference(drawn, ours) > 0.01


@pytest.mark.parametrize(
    ("seeds", "shape"), [([], (4, 8, 8)), ([-1], (4, 8, 8)), ([2**64], (4, 8, 8)), ([1], (4, 0, 8))]
)
def test_what_is_no_seed_or_shape(seeds, shape):
    with pytest.raises(PSAError, match="latents of shape|seed is"):
        initial_latents(seeds, shape)
