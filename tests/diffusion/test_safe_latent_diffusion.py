"""Safe Latent Diffusion, call by call against diffusers' own function."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe
from support.torch_models import nhwc, tensor

from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.safe_latent_diffusion import guide_safely, no_memory
from psa_jax.diffusion.sld_strengths import STRENGTHS
from psa_jax.errors import PSAError

THEIR_NAMES = {
    "warmup": "sld_warmup_steps",
    "scale": "sld_guidance_scale",
    "threshold": "sld_threshold",
    "momentum_scale": "sld_momentum_scale",
    "momentum_decay": "sld_mom_beta",
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_call_is_diffusers(name):
    """20 calls, so that every warm-up ends, with outputs near each other, as they are in sampling."""
    strength, memory, momentum = STRENGTHS[name], no_memory(nhwc(tensor(2, 4, 8, 8, seed=0))), None
    settings = {theirs: getattr(strength, ours) for ours, theirs in THEIR_NAMES.items()}
    assert settings == getattr(SafetyConfig, name.upper())
    changed = 0
    for call in range(20):
        common = tensor(2, 4, 8, 8, seed=4 * call)
        text, without, concept = (common + 0.05 * tensor(2, 4, 8, 8, seed=4 * call + k) for k in (1, 2, 3))
        expected, momentum = StableDiffusionPipelineSafe.perform_safety_guidance(
            SimpleNamespace(), True, momentum, text - without, (text, without, concept), call, **settings
        )
        found, memory = guide_safely(
            *map(nhwc, (without, text, concept)), jnp.float32(7.5), jnp.float32(0.0), strength, memory
        )
        expected = without + 7.5 * expected
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=2e-5)
        np.testing.assert_allclose(memory.momentum, momentum.permute(0, 2, 3, 1).numpy(), atol=1e-6)
        plain = without + 7.5 * (text - without)
        assert ((expected - plain).abs().max() > 0.01) == (call >= strength.warmup)
        changed += call >= strength.warmup
    assert changed == 20 - strength.warmup


@pytest.mark.parametrize(
    ("options", "call", "says"),
    [
        ({"sld": "mild"}, {}, "sld 'mild' is unknown; use one of weak, medium, strong, max"),
        ({"sld": "weak", "guidance": 1.0}, {}, "guidance 1.0 is none; give guidance above 1"),
        ({"sld": "weak"}, {"concept": ["x", "y"]}, "concepts for 1 prompts"),
        ({"sld": "weak"}, {"concept": " "}, "one text that says something"),
        ({}, {"concept": "blood"}, "a concept is what sld leads away from; give sld"),
    ],
)
def test_what_is_refused(smallest_pipeline, options, call, says):
    with pytest.raises(PSAError) as caught:
        Generator(smallest_pipeline[1], batch_size=1, **options)(["a cat"], [0], **call)
    assert says in str(caught.value)
