"""SD2.x and SDXL folders: all parts as diffusers has them, written back byte for byte, mixed parts refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from support.torch_models import TOLERANCE, difference, nhwc, run, tensor
from support.torch_pipelines import state_dicts

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, load_vae, save_stable_diffusion, weights_hash
from psa_jax.models.unet import AddedConditions

PROMPTS = ["a cat, a dog!", "Café"]


@pytest.fixture
def broken(sdxl, tmp_path) -> Path:
    """An SDXL folder to damage."""
    return shutil.copytree(sdxl[0], tmp_path / "model")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_tensors(folder: Path, pipeline, dtype=torch.float32) -> None:
    for name, tensors in state_dicts(pipeline).items():
        (file,) = (folder / name).glob("*.safetensors")
        stored = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
        assert stored.keys() == {key.removeprefix("text_model.") for key in tensors}
        for key, value in tensors.items():
            written = stored[key.removeprefix("text_model.")]
            assert written.dtype == dtype
            assert torch.equal(written, value.to(dtype)), (name, key)


def test_sdxl_from_prompts_to_prediction(sdxl):
    folder, pipeline = sdxl
    model = load_stable_diffusion(folder)
    assert model.family == "sdxl"
    assert model.force_zeros_for_empty_prompt
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    latents = tensor(2, 4, 8, 8)
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16], [12, 20, 4, 0, 16, 8]])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    expected = pipeline.unet(latents, torch.tensor([7, 512]), states, added_cond_kwargs=added).sample

    def predict(unet, first, second, ids, ids_2, latents, time_ids):
        one, two = first(ids), second(ids_2)
        text = jnp.concatenate([one.hidden[-2], two.hidden[-2]], axis=-1)
        times = jnp.asarray([7.0, 512.0], dtype=jnp.float32)
        return unet(latents, times, unet.context(text), AddedConditions(two.projected, time_ids))

    ids, ids_2 = model.tokenize(PROMPTS), model.tokenize_2(PROMPTS)
    for tokenizer, ours in ((pipeline.tokenizer, ids), (pipeline.tokenizer_2, ids_2)):
        theirs = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert ids[1, -1] == model.tokenizer.eos_token_id
    assert ids_2[1, -1] == 0
    models = (model.unet, model.text_encoder, model.text_encoder_2)
    got = run(predict, *models, jnp.asarray(ids), jnp.asarray(ids_2), nhwc(latents), jnp.asarray(time_ids.numpy()))
    assert difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "pipeline_class"), [("sd2", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_round_trip_in_half_precision(family, pipeline_class, request, tmp_path):
    folder, pipeline = request.getfixturevalue(family)
    half = shutil.copytree(folder, tmp_path / "half")
    for file in half.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    model = load_stable_diffusion(half, dtype=jnp.float16)
    assert model.family == family
    save_stable_diffusion(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", pipeline, torch.float16)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (folder / name).is_dir():
            assert (folder / name / "config.json").read_bytes() == (
                tmp_path / "out" / name / "config.json"
            ).read_bytes()

    again = pipeline_class.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(again) is type(pipeline)
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipeline, name):
            ids = [getattr(p, name)(PROMPTS, padding="max_length")["input_ids"] for p in (pipeline, again)]
            assert ids[0] == ids[1]
    assert again.config.get("force_zeros_for_empty_prompt") == pipeline.config.get("force_zeros_for_empty_prompt")


def test_a_folder_written_from_nothing_opens_in_diffusers(sdxl, tmp_path):
    model = load_stable_diffusion(sdxl[0])
    model.folder = tmp_path / "nothing here"
    model.force_zeros_for_empty_prompt = False
    save_stable_diffusion(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", sdxl[1])
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert not again.config.force_zeros_for_empty_prompt
    assert not load_stable_diffusion(tmp_path / "out").force_zeros_for_empty_prompt
    theirs, ours = (p.encode_prompt(PROMPTS, do_classifier_free_guidance=False) for p in (sdxl[1], again))
    for a, b in zip(theirs, ours, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_sd2_pads_with_its_own_token(sd2):
    model = load_stable_diffusion(sd2[0])
    assert model.family == "sd2"
    assert model.tokenize(["cat"])[0, 3:].tolist() == [0] * 74
    with pytest.raises(PSAError, match="a sd2 model has one text encoder"):
        model.tokenize_2(["cat"])


def test_another_vae(sdxl, sd1, tmp_path):
    vae = sd1[1].vae
    other = load_vae(sd1[0])
    for source in (sd1[0], sd1[0] / "vae"):  # the main model's scaling factor gives way to that of the folder
        config = load_stable_diffusion(sdxl[0], vae=source).vae.config
        assert config == other.config
        assert config.scaling_factor != sdxl[1].vae.config.scaling_factor
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_stable_diffusion(sdxl[0], vae=tmp_path / "vae.safetensors").vae
    np.testing.assert_array_equal(loaded.decoder.conv_out.bias[...], vae.decoder.conv_out.bias.numpy())
    assert loaded.config.scaling_factor == sdxl[1].vae.config.scaling_factor
    with pytest.raises(PSAError, match="vae.ckpt: vae.ckpt is a pickle"):
        load_stable_diffusion(sdxl[0], vae=tmp_path / "vae.ckpt")


def test_the_hash_covers_every_text_encoder(broken):
    before = weights_hash(broken)
    path = broken / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert weights_hash(broken) != before
    assert weights_hash(path) != weights_hash(broken)


def test_the_base_model_is_known_by_its_values(sdxl, broken):
    model = load_stable_diffusion(broken)
    before, files = model.base_hash, weights_hash(broken)
    stem = broken / "unet" / "diffusion_pytorch_model"
    tensors = load_file(f"{stem}.safetensors")
    save_file(tensors, f"{stem}.non_ema.safetensors", {"format": "pt", "note": "never read"})
    save_file({name: tensor.half() for name, tensor in tensors.items()}, f"{stem}.safetensors", {"format": "pt"})
    again = load_stable_diffusion(broken)
    assert again.is_base_of({"base_model": before})
    assert load_stable_diffusion(sdxl[0]).is_base_of({"base_model": files})
    save_stable_diffusion(again, broken.parent / "exported")
    shutil.copy(broken / "unet" / f"{Path(stem).name}.non_ema.safetensors", broken.parent / "exported" / "unet")
    assert load_stable_diffusion(broken.parent / "exported").base_hash == before
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1}, f"{stem}.safetensors", {"format": "pt"})
    assert not load_stable_diffusion(broken).is_base_of({"base_model": before})


def index(**changes):
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def config(part, **changes):
    return lambda folder: edit_json(folder / part / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer_2"), ["tokenizer_2", "tokenizer files not found"]),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), ["text_encoder_2/config.json", "file not found"]),
        (index(_class_name="StableDiffusion3Pipeline"), ["'StableDiffusion3Pipeline' is not supported"]),
        (index(_class_name="StableDiffusionPipeline"), ["cross_attention_dim is 56", "text_encoder hidden_size is 32"]),
        (index(text_encoder_2=[None, None]), ["lists no text_encoder_2"]),
        (index(vae=["diffusers", "AutoencoderTiny"]), ["vae is of class 'AutoencoderTiny'"]),
        (index(text_encoder_2=["transformers"]), ["['transformers'] as text_encoder_2", "[library, class]"]),
        (index(unet=["my_unet", "UNet2DConditionModel"]), ["unet is of the library 'my_unet'", "only diffusers"]),
        (index(scheduler=[None, None]), ["lists no scheduler"]),
        (config("unet", cross_attention_dim=32), ["cross_attention_dim is 32", "text_encoder_2 hidden_size is 56"]),
        (config("unet", in_channels=9), ["in_channels is 9", "latent_channels is 4"]),
        (config("unet", addition_time_embed_dim=4), ["projection_class_embeddings_input_dim is 60", "is 48"]),
        (
            config(
                "unet",
                addition_embed_type=None,
                addition_time_embed_dim=None,
                projection_class_embeddings_input_dim=None,
            ),
            ["addition_embed_type is None", "text_time"],
        ),
        (config("text_encoder", max_position_embeddings=70), ["max_position_embeddings is 70"]),
        (config("text_encoder_2", projection_dim=23), ["projection_class_embeddings_input_dim is 60"]),
        (config("text_encoder_2", vocab_size=100), ["tokenizer_2", "vocab_size is 100"]),
    ],
    ids=lambda value: value[0].replace(" ", "-") if isinstance(value, list) else "",
)
def test_parts_that_are_absent_or_do_not_fit(damage, words, broken):
    damage(broken)
    with pytest.raises(PSAError) as caught:
        load_stable_diffusion(broken)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in [str(broken), *words]), text
