"""SDXL with its pooled text edited: the same predictions and pictures in JAX, psa_jax.torch and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.torch_adapters import (
    as_jax,
    edited_pooled,
    file_tensors,
    gates_of_prompts,
    prompt_states,
    random_adapter,
    untrained_adapter,
    user_tokens,
)
from support.torch_models import TOLERANCE, difference, nhwc, run, tensor
from support.torch_runtime import PROMPTS, latents, open_pipeline

from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.unet import AddedConditions
from psa_jax.torch import AdaptedUNet, load_adapter, load_psa

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

USERS = tensor(2, 7, seed=6)
SIZES = {"attention": {"tokens": 4}, "categories": {"tokens": 0, "gate": "categories", "mixing": True}}


@pytest.fixture(scope="module")
def model(sdxl):
    return load_stable_diffusion(sdxl[0])


def configure(model, gate: str) -> AdapterConfig:
    return AdapterConfig.for_unet(model.unet.config, user_dim=7, kind="edit", pooled=True, **SIZES[gate])


def test_prediction(model, sdxl, tmp_path):
    """By hand in torch, with the exported module of UNet and adapter, and in JAX."""
    adapter, theirs = random_adapter(configure(model, "attention")), sdxl[1].unet
    save_adapter(adapter, tmp_path / "a.safetensors", {})
    noisy, text, pooled = tensor(2, 4, 8, 8, seed=1), tensor(2, 9, 56, seed=2), tensor(2, 24, seed=3)
    times, scale = torch.tensor([3.0, 900.0]), torch.tensor([0.4, 1.0])
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    w = file_tensors(adapter)
    states = prompt_states(w, text, user_tokens(w, USERS, 56), scale[:, None, None], 8)
    new = edited_pooled(w, pooled, gates_of_prompts(w, text, USERS, 8), scale)

    def by_hand(pooled):
        added = {"text_embeds": pooled, "time_ids": ids}
        return theirs(noisy, times, states, added_cond_kwargs=added).sample

    expected = by_hand(new)
    assert (expected - by_hand(pooled)).abs().max() > 0.01

    def ours(unet, adapter, text, pooled):
        given = as_jax(USERS), as_jax(scale)
        added = AddedConditions(adapter.edit_pooled(pooled, text, *given), as_jax(ids))
        return unet(nhwc(noisy), as_jax(times), adapter(unet, text, *given), added)

    assert difference(run(ours, model.unet, adapter, as_jax(text), as_jax(pooled)), expected) <= TOLERANCE
    module = AdaptedUNet(theirs, load_adapter(tmp_path / "a.safetensors")[0])
    assert (module(noisy, times, text, USERS, scale, pooled, ids) - expected).abs().max() <= TOLERANCE
    with pytest.raises(PSAError, match="none was given; give pooled_prompt_embeds, too"):
        module(noisy, times, text, USERS, scale, None, ids)


@pytest.mark.parametrize(
    ("gate", "unconditional"), [("categories", "off"), ("attention", "zeros"), ("categories", "same")]
)
def test_pictures(model, sdxl, tmp_path, gate, unconditional):
    adapter = random_adapter(configure(model, gate))
    save_adapter(adapter, tmp_path / "a.safetensors", {"family": "sdxl"})
    scale, noise = np.float32([0.4, 1.0]), latents()
    options = {"steps": 2, "guidance": 5.0, "unconditional": unconditional, "batch_size": 2}
    generator, given = Generator(model, adapter, **options), {"latents": noise.permute(0, 2, 3, 1).numpy()}
    ours = np.clip(generator.pixels(PROMPTS, [0, 1], USERS.numpy(), scale=scale, **given) * 0.5 + 0.5, 0.0, 1.0)
    psa = load_psa(open_pipeline(sdxl[0], StableDiffusionXLPipeline), tmp_path / "a.safetensors")
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", "latents": noise}
    drawn = psa(PROMPTS, user=USERS, scale=scale.tolist(), unconditional=unconditional, **call).images
    assert np.abs(drawn - ours).max() <= 1e-3
    if unconditional == "off":
        base = Generator(model, steps=2, guidance=5.0, batch_size=2).pixels(PROMPTS, [0, 1], **given)
        assert np.abs(ours - np.clip(base * 0.5 + 0.5, 0.0, 1.0)).max() > 0.001
        untrained = generator.with_adapter(untrained_adapter(adapter.config))
        for other, strength in ((untrained, 1.0), (generator, 0.0)):
            same = other.pixels(PROMPTS, [0, 1], USERS.numpy(), scale=strength, **given)
            np.testing.assert_allclose(same, base, rtol=0, atol=1e-6)
        one = generator.pixels(PROMPTS[:1], [0], USERS.numpy()[:1], scale=scale[:1], latents=given["latents"][:1])
        np.testing.assert_allclose(np.clip(one * 0.5 + 0.5, 0.0, 1.0), ours[:1], rtol=0, atol=1e-5)


def test_another_base_model_is_refused(small_pipeline):
    unet = small_pipeline[1].unet.config
    config = AdapterConfig("edit", 4, 7, unet.cross_attention_dim, unet.cross_attentions, pooled=24)
    generator = Generator(small_pipeline[1], random_adapter(config), steps=1)
    with pytest.raises(PSAError, match="edits a pooled text of 24 numbers, the base model has none"):
        generator.pixels(["a cat"], [0], np.asarray(jnp.zeros((1, 7))))
