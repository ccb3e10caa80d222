"""Whole pictures against diffusers' StableDiffusionPipeline, with and without an adapter."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.torch_adapters import adapted_unet, random_adapter, untrained_adapter
from support.torch_models import tensor

from psa_jax.diffusion.generate import Generator, initial_latents
from psa_jax.diffusion.pixels import from_bytes, to_bytes
from psa_jax.errors import PSAError
from psa_jax.models.adapter_config import AdapterConfig

PROMPTS = ["a cat", "cat on a cat, at last", "c"]
SEEDS = [1, 2, 3]
STEPS = 4
USERS = tensor(3, 6, seed=3).numpy()
LATENTS = tensor(3, 4, 8, 8, seed=4)  # as torch has them
NHWC = LATENTS.permute(0, 2, 3, 1).numpy()


def configure(model, kind: str = "text", tokens: int = 2) -> AdapterConfig:
    return AdapterConfig.for_unet(model.unet.config, user_dim=6, kind=kind, tokens=tokens)


@pytest.fixture(scope="module")
def base(small_pipeline) -> Generator:
    return Generator(small_pipeline[1], steps=STEPS, batch_size=2)


@pytest.fixture(scope="module")
def off(small_pipeline) -> tuple[Generator, object]:
    model = small_pipeline[1]
    adapter = random_adapter(configure(model))
    return Generator(model, adapter, steps=STEPS, batch_size=2), adapter


def unit(pixels: np.ndarray) -> np.ndarray:
    """[−1, 1] to [0, 1], as diffusers gives them."""
    return np.clip(pixels * 0.5 + 0.5, 0.0, 1.0)


def torch_pictures(pipeline, prompts: list[str], latents: torch.Tensor, **options) -> np.ndarray:
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "np"} | options
    return pipeline(prompts, latents=latents.clone(), **options).images


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.shape == ours.shape
    assert theirs.std() > 0.05, "a flat picture says little"
    assert np.abs(unit(ours) - theirs).max() <= 1e-3


def test_pictures_of_the_base_model(small_pipeline, base):
    theirs = small_pipeline[0]
    expected = torch_pictures(theirs, PROMPTS, LATENTS)
    ours = base.pixels(PROMPTS, SEEDS, latents=NHWC)
    assert_same_pictures(ours, expected)
    assert np.abs(base(PROMPTS, SEEDS, latents=NHWC) - 255.0 * expected).max() <= 0.5 + 0.255

    negative = torch_pictures(theirs, PROMPTS, LATENTS, negative_prompt=["at a"] * 3)
    assert_same_pictures(base.pixels(PROMPTS, SEEDS, latents=NHWC, negative="at a"), negative)
    assert np.abs(negative - expected).max() > 0.01


def test_pictures_do_not_depend_on_their_batch(base):
    together = base.pixels(PROMPTS, SEEDS)
    assert np.abs(together[0] - together[1]).max() > 0.1
    for i in range(3):
        alone = base.pixels(PROMPTS[i : i + 1], SEEDS[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-5)
    backwards = base.pixels(PROMPTS[::-1], SEEDS[::-1])
    np.testing.assert_allclose(backwards[::-1], together, rtol=0, atol=1e-5)


def test_pictures_do_not_depend_on_the_batch_size(small_pipeline, base):
    other = Generator(small_pipeline[1], steps=STEPS, batch_size=3)
    np.testing.assert_allclose(other.pixels(PROMPTS, SEEDS), base.pixels(PROMPTS, SEEDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("unconditional", ["off", "zeros", "same"])
def test_the_unconditional_branch(small_pipeline, off, unconditional):
    theirs, model = small_pipeline
    generator, adapter = off
    if unconditional != "off":
        generator = Generator(model, adapter, steps=STEPS, batch_size=2, unconditional=unconditional)
    scale = torch.tensor([1.0, 0.5])
    users = torch.from_numpy(USERS[:2])
    # In diffusers the two halves of the batch are the unconditional and the conditional one.
    first_user = torch.zeros_like(users) if unconditional == "zeros" else users
    first_scale = torch.zeros_like(scale) if unconditional == "off" else scale
    pipeline = copy.copy(theirs)
    pipeline.unet = adapted_unet(theirs.unet, adapter, torch.cat([first_user, users]), torch.cat([first_scale, scale]))
    expected = torch_pictures(pipeline, PROMPTS[:2], LATENTS[:2])
    got = generator.pixels(PROMPTS[:2], SEEDS[:2], USERS[:2], scale=scale.numpy(), latents=NHWC[:2])
    assert_same_pictures(got, expected)
    assert np.abs(expected - torch_pictures(theirs, PROMPTS[:2], LATENTS[:2])).max() > 0.01


def test_scale_zero_and_untrained_adapters_draw_the_base_pictures(small_pipeline, base, off):
    generator, adapter = off
    expected = base.pixels(PROMPTS, SEEDS)
    np.testing.assert_allclose(generator.pixels(PROMPTS, SEEDS, USERS, scale=0.0), expected, rtol=0, atol=1e-5)
    untrained = generator.with_adapter(untrained_adapter(adapter.config))
    np.testing.assert_allclose(untrained.pixels(PROMPTS, SEEDS, USERS), expected, rtol=0, atol=1e-5)


def test_with_adapter(small_pipeline, off):
    model = small_pipeline[1]
    generator, adapter = off
    before = generator.pixels(PROMPTS[:2], SEEDS[:2], USERS[:2])
    other = generator.with_adapter(random_adapter(adapter.config, seed=9))
    after = other.pixels(PROMPTS[:2], SEEDS[:2], USERS[:2])
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(generator.pixels(PROMPTS[:2], SEEDS[:2], USERS[:2]), before)
    back = other.with_adapter(adapter)
    np.testing.assert_array_equal(back.pixels(PROMPTS[:2], SEEDS[:2], USERS[:2]), before)
    assert other._generate._cache_size() == 1  # nothing was compiled again

    for kind, tokens in (("text", 4), ("concept", 2)):
        with pytest.raises(PSAError, match="another configuration"):
            generator.with_adapter(random_adapter(configure(model, kind, tokens)))


def test_users_are_needed_exactly_with_an_adapter(base, off):
    generator = off[0]
    with pytest.raises(PSAError, match="give both or neither"):
        base.pixels(PROMPTS, SEEDS, USERS)
    with pytest.raises(PSAError, match="give both or neither"):
        generator.pixels(PROMPTS, SEEDS)
    for users in (USERS[:2], USERS[:, :5]):
        with pytest.raises(PSAError, match=r"the adapter needs \(3, 6\)"):
            generator.pixels(PROMPTS, SEEDS, users)
    with pytest.raises(PSAError, match="3 prompts and 2 seeds: give at least one prompt"):
        base.pixels(PROMPTS, SEEDS[:2])


def test_misshapen_arguments(base):
    with pytest.raises(PSAError, match="0 prompts and 0 seeds"):
        base([], [])
    with pytest.raises(PSAError, match=r"scale has shape \(2,\): give one number or one for each of 3 prompts"):
        base(PROMPTS, SEEDS, scale=np.ones(2, np.float32))
    with pytest.raises(PSAError, match=r"latents have shape \(3, 4, 8, 8\), expected \(3, 8, 8, 4\)"):
        base(PROMPTS, SEEDS, latents=LATENTS.numpy())


@pytest.mark.parametrize("size", [(0, 16), (16, -4), (16, 17), (7, 16)])
def test_bad_sizes(small_pipeline, size):
    # One VAE level halves once; the UNet takes latents of any size.
    with pytest.raises(PSAError, match=f"picture size {size[0]}x{size[1]}: both sides must be positive multiples of 2"):
        Generator(small_pipeline[1], size=size)


def test_bad_options(small_pipeline):
    with pytest.raises(PSAError, match="unconditional 'none' is unknown; use one of off, zeros, same"):
        Generator(small_pipeline[1], unconditional="none")
    with pytest.raises(PSAError, match="between 1 and 999, got 0"):
        Generator(small_pipeline[1], steps=0)


def test_latent_shape(small_pipeline, base):
    assert base.latent_shape == (8, 8, 4)
    assert Generator(small_pipeline[1], size=(20, 12)).latent_shape == (10, 6, 4)


def test_initial_latents_are_one_key_a_seed():
    latents = np.asarray(initial_latents([5, 6, 5], (64, 64, 4)))
    np.testing.assert_array_equal(latents[0], latents[2])
    np.testing.assert_array_equal(latents[1], initial_latents([6], (64, 64, 4))[0])
    assert abs(np.corrcoef(latents[0].ravel(), latents[1].ravel())[0, 1]) < 0.05
    assert abs(latents.mean()) < 0.02
    assert abs(latents.std() - 1.0) < 0.02


def test_to_bytes():
    # 127.5 rounds to even; beyond the range is clipped.
    pixels = np.asarray([-1.0, 0.0, 1.0, -7.0, 7.0, 0.5], np.float32)
    np.testing.assert_array_equal(to_bytes(pixels), [0, 128, 255, 0, 255, 191])
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(PSAError, match="a picture is not finite and was not made"):
            to_bytes(np.append(pixels, np.float32(bad)))


def test_every_byte_comes_back():
    everything = np.arange(256, dtype=np.uint8)
    pixels = from_bytes(everything)
    assert pixels.dtype == np.float32 and (pixels[0], pixels[-1]) == (-1, 1)
    np.testing.assert_array_equal(to_bytes(pixels), everything)
    # XLA multiplies by the reciprocal.
    np.testing.assert_allclose(from_bytes(jnp.asarray(everything)), pixels, rtol=0, atol=2**-23)
