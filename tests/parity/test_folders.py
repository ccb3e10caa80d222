"""Folders as users have them: size, timesteps, token ids and pictures of `from_pretrained` and `load_stable_diffusion`.

Nothing is given to diffusers but the folder: what its pipelines put right on loading is part of what is compared.
"""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch_pipelines import torch_noise
from torch_samplers import BETAS, assert_same

from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.scheduler_config import sampler_from_config
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, open_folder, save_stable_diffusion

# diffusers gives torch tensors to numpy in an old way, and says what it puts right.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROMPTS, SEEDS, STEPS = ["a cat at a cat", "A  Café"], [3, 4], 5
PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def edit(file: str, **changes):
    """Changes keys of a JSON file; `...` takes one out."""

    def change(folder: Path) -> None:
        path = folder / file
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in changes or value != ...}))

    return change


def scheduler(name: str, listed: str | None = None, **keys):
    """The scheduler's file with just these keys, and the class (`listed` in model_index.json)."""

    def change(folder: Path) -> None:
        config = BETAS | {"_class_name": name, "_diffusers_version": "0.2.2"} | keys
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        edit("model_index.json", scheduler=["diffusers", listed or name])(folder)

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


OLD_UNET = {"_diffusers_version": "0.2.2"}
LEADING = {"timestep_spacing": "leading"}
PLMS = {"skip_prk_steps": True}
# Name -> (fixture, what is changed in its folder).
FOLDERS = {
    "today": ("sd1", lambda folder: None),
    "sd1-of-2022": (
        "sd1",
        both(edit("unet/config.json", sample_size=32, **OLD_UNET), scheduler("PNDMScheduler", **PLMS)),
    ),
    "height-and-width": ("sd1", edit("unet/config.json", sample_size=[8, 12], **OLD_UNET)),
    "small-since-0.9": ("sd1", edit("unet/config.json", sample_size=12, _diffusers_version="0.9.0.dev0")),
    "pndm-offset-0": ("sd1", scheduler("PNDMScheduler", steps_offset=0, **PLMS)),
    "pndm-runge-kutta": ("sd1", scheduler("PNDMScheduler")),
    "ddim-bare": ("sd1", scheduler("DDIMScheduler")),
    "ddim-clipped": ("sd1", scheduler("DDIMScheduler", clip_sample=True, steps_offset=0)),
    "euler-leading": ("sd1", scheduler("EulerDiscreteScheduler", **LEADING)),
    "ancestral-leading": ("sd1", scheduler("EulerAncestralDiscreteScheduler", clip_sample=True, **LEADING)),
    "dpm-leading": ("sd1", scheduler("DPMSolverMultistepScheduler", solver_type="bh2", **LEADING)),
    "unipc-leading": ("sd1", scheduler("UniPCMultistepScheduler", solver_type="midpoint", **LEADING)),
    "listed-pndm-file-ddim": ("sd1", scheduler("DDIMScheduler", "PNDMScheduler", clip_sample=True)),
    "listed-euler-file-unipc": (
        "sd1",
        scheduler("UniPCMultistepScheduler", "EulerDiscreteScheduler", solver_order=3),
    ),
    "listed-unipc-file-ddpm": ("sd1", scheduler("DDPMScheduler", "UniPCMultistepScheduler", clip_sample=True)),
    "xl-today": ("sdxl", lambda folder: None),
    "xl-ddim-clipped": ("sdxl", scheduler("DDIMScheduler", prediction_type="v_prediction")),
    "xl-pndm-offset-0": ("sdxl", scheduler("PNDMScheduler", **PLMS)),
    "xl-old-unet": ("sdxl", edit("unet/config.json", sample_size=12, **OLD_UNET)),
    "xl-listed-unipc": ("sdxl", scheduler("EulerDiscreteScheduler", "UniPCMultistepScheduler", **LEADING)),
}


def changed(request, tmp_path: Path, name: str, change) -> Path:
    folder = shutil.copytree(request.getfixturevalue(name)[0], tmp_path / "model")
    change(folder)
    return folder


def opened(name: str, folder: Path, **options):
    pipeline = PIPELINES[name].from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokens(pipeline) -> list[np.ndarray]:
    tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
    return [
        tokenizer(
            PROMPTS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="np"
        ).input_ids
        for tokenizer in tokenizers
        if tokenizer is not None
    ]


def picture(pipeline, latents: np.ndarray, **options) -> np.ndarray:
    return pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_read_as_diffusers_reads_it(case, request, tmp_path, monkeypatch):
    """Size, token ids, and the sampler call by call against the scheduler that the pipeline has."""
    name, change = FOLDERS[case]
    folder = changed(request, tmp_path, name, change)
    theirs, model = opened(name, folder), load_stable_diffusion(folder)
    own = theirs(PROMPTS[0], num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    factor = theirs.vae_scale_factor
    assert model.picture_size == (own.shape[2] * factor, own.shape[3] * factor)
    for got, expected in zip(model.token_ids(PROMPTS), tokens(theirs), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert_same(monkeypatch, sampler_from_config(model.scheduler_config, STEPS), theirs.scheduler, STEPS)


@pytest.mark.parametrize(
    "case",
    ["sd1-of-2022", "height-and-width", "ddim-bare", "listed-pndm-file-ddim", "ancestral-leading", "unipc-leading"]
    + ["xl-ddim-clipped", "xl-listed-unipc"],
)
def test_a_folder_draws_what_diffusers_draws(case, request, tmp_path, monkeypatch):
    name, change = FOLDERS[case]
    folder = changed(request, tmp_path, name, change)
    theirs, model = opened(name, folder), load_stable_diffusion(folder)
    size = (16, 16) if max(model.picture_size) > 24 else None  # as it is read, above; drawn small
    ours = Generator(model, steps=STEPS, guidance=3.0, batch_size=2, size=size)
    latents = np.random.default_rng(0).standard_normal((2, *ours.latent_shape)).astype(np.float32)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", torch_noise(SEEDS), raising=True
    )
    options = {} if size is None else dict(zip(("height", "width"), size, strict=True))
    expected = picture(theirs, latents, **options)
    assert expected.std() > 0.02, "a flat picture says little"
    drawn = np.clip(ours.pixels(PROMPTS, SEEDS, latents=latents) * 0.5 + 0.5, 0, 1)
    assert drawn.shape == expected.shape
    assert np.abs(drawn - expected).max() <= 1e-3


SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}


@pytest.mark.parametrize("case", ["sd1-of-2022", "ddim-clipped", "ddim-bare", "dpm-leading", "listed-unipc-file-ddpm"])
def test_another_sampler_is_made_of_what_the_pipeline_knows(case, request, tmp_path):
    """`NewScheduler.from_config(pipe.scheduler.config)` leaves out what the pipeline put in, not what it put right."""
    name, change = FOLDERS[case]
    folder = changed(request, tmp_path, name, change)
    parts, model = opened(name, folder).components, load_stable_diffusion(folder)
    for sampler, scheduler_class in SAMPLERS.items():
        if parts["scheduler"].config["_class_name"] == scheduler_class:
            continue
        options = {"skip_prk_steps": True} if sampler == "pndm" else {}
        theirs = getattr(diffusers, scheduler_class).from_config(parts["scheduler"].config, **options)
        theirs.set_timesteps(STEPS)
        ours = sampler_from_config(model.scheduler_config, STEPS, sampler)
        np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=0, atol=1e-4)
        if sampler == "ddim":
            assert ours.clip == (1.0 if theirs.config.clip_sample else None)


def listed(**changes):
    return edit("model_index.json", **changes)


# What diffusers opens as the same pipeline.
SAME = {
    "custom-class": listed(_class_name=["pipeline_custom", "MyPipeline"]),
    "image-to-image": listed(_class_name="StableDiffusionImg2ImgPipeline"),
    "entry-of-one": listed(custom=["x"], _tags=["a", "b"], tags=["a", "b", "c"], nothing=[None]),
    "other-parts": listed(motion_adapter=["diffusers", "MotionAdapter"], image_encoder=[None, None]),
    "newer-keys": listed(_diffusers_version="0.99.0.dev0", _name_or_path="x/y", requires_aesthetics_score=False),
    "general-tokenizer": listed(tokenizer=["transformers", "PreTrainedTokenizerFast"]),
    "tokenizers-backend": listed(tokenizer=["transformers", "TokenizersBackend"]),
    "class-of-text": edit("text_encoder/config.json", architectures=["CLIPModel"], model_type="clip"),
    "keys-of-text": edit("text_encoder/config.json", attn_implementation="sdpa", gradient_checkpointing=True),
    "keys-of-unet": edit("unet/config.json", quantization_config=None, motion=[1], layers_per_block=[1, 1]),
    "keys-of-vae": edit("vae/config.json", sample_size=[64, 64], quantization_config=None, extra={"a": 1}),
    "keys-of-scheduler": edit("scheduler/scheduler_config.json", stepz=1, use_karras_sigmas=True, solver_order=9),
    "no-class-of-scheduler": edit("scheduler/scheduler_config.json", _class_name=..., _diffusers_version=...),
}


@pytest.mark.parametrize("case", SAME)
def test_what_diffusers_opens_as_the_same_is_the_same(case, request, sd1, tmp_path):
    folder = changed(request, tmp_path, "sd1", SAME[case])
    before, theirs, ours = open_folder(sd1[0]), opened("sd1", folder), open_folder(folder)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_array_equal(picture(theirs, latents), picture(sd1[1], latents))
    sizes = [{**parts.configs, "vae": parts.configs["vae"].downscale} for parts in (before, ours)]
    assert sizes[0] == sizes[1]
    assert ours.scheduler.items() >= before.scheduler.items() - {("_diffusers_version", diffusers.__version__)}
    assert ours.pipeline == before.pipeline
    ids = ours.tokenizers["tokenizer"](PROMPTS, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids, tokens(theirs)[0])


# What diffusers does not open, or draws another picture with.
REFUSED = {
    "no-class": (listed(_class_name=None), "pipeline class None"),
    "class-in-an-object": (listed(_class_name={"a": "b"}), "pipeline class {'a': 'b'}"),
    "other-class": (listed(_class_name="LatentConsistencyModelPipeline"), "LatentConsistencyModelPipeline"),
    "entry-of-three": (listed(unet=["diffusers", "UNet2DConditionModel", {"a": "x"}]), "as unet; expected"),
    "entry-of-one": (listed(unet=["diffusers"]), "as unet; expected"),
    "entry-is-text": (listed(vae="AutoencoderKL"), "'AutoencoderKL' as vae; expected"),
    "entry-of-lists": (listed(vae=[["diffusers"], ["AutoencoderKL"]]), "as vae; expected"),
    "no-scheduler": (listed(scheduler=[None, None]), "lists no scheduler"),
    "empty-entry": (listed(scheduler=[]), r"has \[\] as scheduler"),
    "scheduler-of-others": (listed(scheduler=["my_code", "DDIMScheduler"]), "scheduler is of the library 'my_code'"),
    "unet-of-others": (listed(unet=["my_code", "UNet2DConditionModel"]), "unet is of the library 'my_code'"),
    "flax": (listed(unet=["diffusers", "FlaxUNet2DConditionModel"]), "FlaxUNet2DConditionModel"),
    "tokenizer": (listed(tokenizer=["transformers", "AutoTokenizer"]), "AutoTokenizer"),
    "index-is-a-list": (lambda folder: (folder / "model_index.json").write_text("[]"), "expected a JSON object"),
    "version": (edit("unet/config.json", _diffusers_version="new"), "_diffusers_version 'new' is no version"),
    "sizes": (edit("unet/config.json", sample_size=[8, 8, 8]), r"sample_size .*8, 8, 8.* is not supported"),
    "quantised": (edit("unet/config.json", quantization_config={"bits": 4}), "quantization_config"),
    "defaults": (edit("scheduler/scheduler_config.json", _use_default_values=7), "_use_default_values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_one_line(case, request, tmp_path):
    change, words = REFUSED[case]
    folder = changed(request, tmp_path, "sd1", change)
    with pytest.raises(PSAError, match=words) as caught:
        load_stable_diffusion(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_size_needs_one(request, tmp_path):
    """diffusers opens it too, and fails where none is given."""
    folder = changed(request, tmp_path, "sd1", edit("unet/config.json", sample_size=None))
    with pytest.raises(TypeError):
        opened("sd1", folder)(PROMPTS, num_inference_steps=2)
    model = load_stable_diffusion(folder)
    with pytest.raises(PSAError, match=r"the UNet has no sample_size; give the size of pictures \(--size"):
        Generator(model)
    assert Generator(model, size=(16, 24)).latent_shape == (8, 12, 4)
    with pytest.raises(PSAError, match="--resolution"):
        _ = model.square_side


def test_a_size_that_is_not_square_is_not_taken_for_a_side(request, tmp_path):
    folder = changed(request, tmp_path, "sd1", edit("unet/config.json", sample_size=[8, 12]))
    model = load_stable_diffusion(folder)
    assert model.picture_size == (16, 24)
    with pytest.raises(PSAError, match=r"makes 16x24 pictures; give a side in pixels \(--resolution\)"):
        _ = model.square_side


def test_an_old_folder_is_written_as_what_it_was_read_as(request, tmp_path):
    """The corrected size is written; the scheduler's file stays as it was, and diffusers corrects it again."""
    folder = changed(request, tmp_path, *FOLDERS["sd1-of-2022"])
    model = load_stable_diffusion(folder)
    save_stable_diffusion(model, tmp_path / "out")
    theirs, again = opened("sd1", tmp_path / "out"), load_stable_diffusion(tmp_path / "out")
    assert theirs.unet.config.sample_size == again.unet.config.sample_size == 64
    assert theirs.scheduler.config.steps_offset == again.scheduler_config["steps_offset"] == 1
    assert again.scheduler_config == model.scheduler_config
    file = "scheduler/scheduler_config.json"
    assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((folder / file).read_text())


def test_a_custom_class_is_not_written_without_its_code(request, tmp_path):
    folder = changed(request, tmp_path, "sd1", SAME["custom-class"])
    save_stable_diffusion(load_stable_diffusion(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
