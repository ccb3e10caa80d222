"""Single files as people have them: what diffusers' `from_single_file` draws with them is drawn here.

Beside the weights they hold markers, an embedding manager, a ControlNet, and the rest of a CLIP.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from support.torch_ldm import checkpoint
from support.torch_models import tensor

from psa_jax.diffusion.generate import Generator
from psa_jax.interop import single_file
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.folder import read_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROMPTS, SEEDS, STEPS = ["a cat", "cat on a cat"], [1, 2], 4
LATENTS = tensor(2, 4, 8, 8, seed=4)
PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
MARKERS = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
CLIP = "cond_stage_model.transformer."


def trained_words(tensors):
    """A dreambooth trainer keeps a copy of the text encoder there."""
    return {f"embedding_manager.embedder.{name}": t for name, t in tensors.items() if name.startswith(CLIP)}


def control(tensors):
    start = "model.diffusion_model.input_blocks."
    copied = {name.replace("model.diffusion_model", "control_model"): t for name, t in tensors.items() if start in name}
    return copied | {"control_model.zero_convs.0.0.weight": torch.ones(16, 16, 1, 1)}


def rest_of_clip(tensors):
    positions = {f"{CLIP}text_model.embeddings.position_ids": torch.arange(77.0)[None].half()}
    scales = {"cond_stage_model.logit_scale": torch.tensor(4.6), f"{CLIP}logit_scale": torch.tensor(4.6)}
    return positions | scales | {f"{CLIP}text_projection.weight": torch.ones(32, 32)}


def left_by_training(tensors):
    return {"global_step": torch.tensor(5), "epoch": torch.tensor(1), "stray.weight": torch.ones(1)}


EXTRAS = {
    "sd1": (trained_words, control, rest_of_clip, left_by_training),
    "sdxl": (lambda tensors: MARKERS, left_by_training),
}


def write(folder, tensors) -> Path:
    path = folder / "model.safetensors"
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path)
    return path


def assert_same_pictures(model, theirs) -> None:
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(PROMPTS, latents=LATENTS.clone(), num_inference_steps=STEPS, guidance_scale=5.0, output_type="np")
    generator = Generator(model, steps=STEPS, batch_size=2, guidance=5.0)
    ours = generator.pixels(PROMPTS, SEEDS, latents=LATENTS.permute(0, 2, 3, 1).numpy())
    assert drawn.images.std() > 0.02
    assert np.abs(np.clip(ours * 0.5 + 0.5, 0.0, 1.0) - drawn.images).max() <= 1e-3


@pytest.mark.parametrize("family", EXTRAS)
def test_what_diffusers_does_not_read_changes_nothing(family, request, tmp_path):
    """With the JSON files of a folder, which say the prediction: markers do not count, as in diffusers."""
    folder, pipeline = request.getfixturevalue(family)
    tensors = checkpoint(pipeline)
    for extra in EXTRAS[family]:
        tensors |= extra(tensors)
    path = write(tmp_path, tensors)
    theirs = PIPELINES[family].from_single_file(path, config=str(folder), local_files_only=True)
    model = load_stable_diffusion(path, config=folder)
    assert model.scheduler_config["prediction_type"] == theirs.scheduler.config.prediction_type == "epsilon"
    assert_same_pictures(model, theirs)


@pytest.mark.parametrize(
    ("family", "markers"), [("sdxl", ("v_pred",)), ("sdxl", ("v_pred", "ztsnr")), ("sd1", ("v_pred", "ztsnr"))]
)
def test_markers_count_where_no_configuration_says_otherwise(family, markers, request, tmp_path, monkeypatch):
    """What model cards of such files tell to give diffusers' scheduler: `from_config(config, **settings)`."""
    folder, pipeline = request.getfixturevalue(family)
    described = read_folder(folder)
    monkeypatch.setitem(single_file.CONFIGS, described.pipeline, described.configs)
    path = write(tmp_path, checkpoint(pipeline) | {name: MARKERS[name] for name in markers})
    model = load_stable_diffusion(path, tokenizer=folder)
    theirs = PIPELINES[family].from_single_file(path, config=str(folder), local_files_only=True)
    kind = EulerDiscreteScheduler if family == "sdxl" else DDIMScheduler
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in markers}
    theirs.scheduler = kind.from_config(
        single_file.SCHEDULERS[described.pipeline] | {"_class_name": kind.__name__}, **settings
    )
    assert_same_pictures(model, theirs)
