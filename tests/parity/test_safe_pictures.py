"""Whole pictures with Safe Latent Diffusion against diffusers' pipeline of it."""

import numpy as np
import pytest
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe
from support.torch_models import tensor

from psa_jax.diffusion.generate import Generator

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about, and has not renewed this pipeline.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
]

PROMPTS = ["a cat", "cat on a cat"]
LATENTS = tensor(2, 4, 8, 8, seed=4)


@pytest.mark.parametrize(("name", "concept"), [("strong", "a mat"), ("max", None)])
def test_same_pictures(small_pipeline, name, concept):
    theirs, model = small_pipeline
    parts = {part: getattr(theirs, part) for part in ("vae", "text_encoder", "tokenizer", "unet")}
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    safe = StableDiffusionPipelineSafe(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    safe.set_progress_bar_config(disable=True)
    if concept is not None:
        safe._safety_text_concept = concept
    options = {"guidance_scale": 5.0, "num_inference_steps": 10, "output_type": "np"}
    expected = safe(PROMPTS, latents=LATENTS.clone(), **options, **getattr(SafetyConfig, name.upper())).images
    noise = LATENTS.permute(0, 2, 3, 1).numpy()
    settings = {"steps": 10, "guidance": 5.0, "sampler": "ddim", "batch_size": 2}
    ours = Generator(model, sld=name, **settings).pixels(PROMPTS, [1, 2], latents=noise, concept=concept)
    ours = np.clip(ours * 0.5 + 0.5, 0.0, 1.0)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    plain = Generator(model, **settings).pixels(PROMPTS, [1, 2], latents=noise)
    assert np.abs(np.clip(plain * 0.5 + 0.5, 0.0, 1.0) - ours).max() > 5e-3
