"""The embedded base model: the same pictures in diffusers, and it obeys prompts it was not trained on."""

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from psa_jax.diffusion.generate import Generator, initial_latents
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.mini.oracle import ASSETS, shipped_oracle
from psa_jax.mini.pretrain import MiniSet


@pytest.fixture(scope="module")
def generator():
    return Generator(load_stable_diffusion("tiny"), steps=12, guidance=4.0, batch_size=16)


def test_diffusers_draws_the_same(generator):
    prompts = ["a cat on a beach with a bell", "crossed blades and a house in the snow"]
    latents = np.asarray(initial_latents([1, 2], generator.latent_shape))
    ours = np.clip(generator.pixels(prompts, [1, 2], latents=latents) * 0.5 + 0.5, 0, 1)
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompts,
        latents=torch.tensor(latents).permute(0, 3, 1, 2),
        num_inference_steps=12,
        guidance_scale=4.0,
        output_type="np",
    ).images
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-3


def test_it_obeys_prompts(generator):
    """Those that name one pictogram; the record has the rates of all kinds over 400 pictures."""
    scenes = MiniSet(80, 31, "test_unseen")
    plain = np.array([p.scene.companion is None and p.absent is None for p in scenes.prompts])
    captions = [caption for caption, is_plain in zip(scenes.captions, plain, strict=True) if is_plain]
    drawn, labels = shipped_oracle()(generator(captions, list(range(len(captions))))), scenes.labels[plain]
    assert len(captions) >= 40
    # 3 standard deviations below the record's rate.
    assert np.mean(np.all(np.sort(drawn.pictograms) == np.sort(labels[:, :2]), axis=1)) >= 0.85
    assert np.mean(drawn.subject == labels[:, 2]) >= 0.95


def test_the_record_belongs_to_the_files():
    record = json.loads((ASSETS / "base_model_metrics.json").read_text())
    for name, digest in record["sha256"].items():
        path = ASSETS / name.replace("model/", "tiny/")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, name
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 12_000_000
