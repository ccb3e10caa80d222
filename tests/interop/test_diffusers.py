"""Folders in diffusers' layout: read strictly, refused in one line, written so that diffusers opens them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from support.torch_models import TOLERANCE, UNETS, VAES, difference, nhwc, run, small_tokenizer, tensor

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import (
    StableDiffusion,
    load_stable_diffusion,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    save_stable_diffusion,
)
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}


@pytest.fixture(scope="session")
def loaded(sd1) -> StableDiffusion:
    return load_stable_diffusion(sd1[0])


@pytest.fixture
def broken(sd1, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sd1[0], tmp_path / "model")


def open_in_diffusers(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def denoise_in_torch(pipeline: StableDiffusionPipeline, latents, ids) -> torch.Tensor:
    text = pipeline.text_encoder(ids).last_hidden_state
    return pipeline.unet(latents, torch.tensor([7, 512]), encoder_hidden_states=text).sample


def denoise(model: StableDiffusion, latents, ids) -> jax.Array:
    def both(unet, text_encoder, latents, ids):
        states = text_encoder(ids).last
        return unet(latents, jnp.asarray([7.0, 512.0], dtype=jnp.float32), unet.context(states))

    return run(both, model.unet, model.text_encoder, nhwc(latents), jnp.asarray(ids.numpy(), dtype=jnp.int32))


PROMPTS = ["a cat, a dog", "Café: 3 cats!"]


def test_pipeline_from_prompts_to_prediction(sd1, loaded):
    pipeline = sd1[1]
    ids = pipeline.tokenizer(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(loaded.tokenize(PROMPTS), ids.numpy())
    latents = tensor(2, 4, 8, 8)
    assert difference(denoise(loaded, latents, ids), denoise_in_torch(pipeline, latents, ids)) <= TOLERANCE


def test_round_trip_keeps_every_byte_and_opens_in_diffusers(sd1, loaded, tmp_path):
    folder, pipeline = sd1
    out = tmp_path / "out"
    save_stable_diffusion(loaded, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    for name in WEIGHTS.values():
        before, after = load_file(folder / name), load_file(out / name)
        after = {key.removeprefix("text_model."): value for key, value in after.items()}
        before = {key.removeprefix("text_model."): value for key, value in before.items()}
        assert before.keys() == after.keys()
        for key in before:
            assert before[key].dtype == after[key].dtype
            assert before[key].tobytes() == after[key].tobytes(), key
    for part in (*WEIGHTS, "scheduler"):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        assert json.loads((out / part / file).read_text()) == json.loads((folder / part / file).read_text())

    again = open_in_diffusers(out)
    assert type(again.scheduler) is type(pipeline.scheduler)
    np.testing.assert_array_equal(again.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    ids = again.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    np.testing.assert_array_equal(ids.numpy(), loaded.tokenize(PROMPTS))
    latents = tensor(2, 4, 8, 8)
    assert torch.equal(denoise_in_torch(again, latents, ids), denoise_in_torch(pipeline, latents, ids))
    assert torch.equal(again.vae.decode(latents).sample, pipeline.vae.decode(latents).sample)


def test_a_folder_made_here_opens_in_diffusers(tmp_path):
    """No JSON of diffusers to copy from: configurations, index and weights are all written here."""
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_act="gelu",
        eos_token_id=tokenizer.eos_token_id,
    )
    model = StableDiffusion(
        folder=tmp_path / "nothing here",
        unet=UNet(UNetConfig(**UNETS["mid_only"] | {"cross_attention_dim": 24}), rngs=nnx.Rngs(0)),
        vae=VAE(VAEConfig(**VAES["flat"] | {"scaling_factor": 0.5}), rngs=nnx.Rngs(1)),
        text_encoder=CLIPText(text, rngs=nnx.Rngs(2)),
        tokenizer=tokenizer,
        scheduler_config={
            "_class_name": "DDPMScheduler",
            "prediction_type": "v_prediction",
            "beta_end": 0.01,
            "clip_sample": False,
            "steps_offset": 1,
        },
    )
    save_stable_diffusion(model, tmp_path / "out")
    pipeline = open_in_diffusers(tmp_path / "out")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae.config.scaling_factor == 0.5
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    np.testing.assert_array_equal(ids.numpy(), model.tokenize(PROMPTS))
    latents = tensor(2, 4, 4, 6)
    assert difference(denoise(model, latents, ids), denoise_in_torch(pipeline, latents, ids)) <= TOLERANCE
    reloaded = load_stable_diffusion(tmp_path / "out")
    for ours, again in ((model.unet, reloaded.unet), (model.vae, reloaded.vae)):
        assert ours.config == again.config
        jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(again))


def test_a_safety_checker_is_neither_read_nor_listed_afterwards(broken, tmp_path):
    index = json.loads((broken / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (broken / "model_index.json").write_text(json.dumps(index))
    save_stable_diffusion(load_stable_diffusion(broken), tmp_path / "out")
    assert open_in_diffusers(tmp_path / "out").safety_checker is None


def test_a_part_of_another_size_gets_its_own_config(loaded, tmp_path):
    other = VAEConfig(**VAES["flat"])
    save_stable_diffusion(dataclasses.replace(loaded, vae=VAE(other, rngs=nnx.Rngs(0))), tmp_path / "out")
    assert load_vae(tmp_path / "out").config == other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_are_read_as_float32(dtype, broken):
    path = broken / WEIGHTS["unet"]
    tensors = {key: value.to(dtype) for key, value in load_torch(path).items()}
    save_torch(tensors, path)
    unet = load_unet(broken)
    expected = tensors["conv_in.bias"].float().numpy()
    np.testing.assert_array_equal(unet.conv_in.bias[...], expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(unet))} == {jnp.dtype("float32")}


def test_names_of_old_files(broken, loaded):
    """VAE attention before diffusers 0.15; the prefix and the buffer of text encoders before transformers 5."""
    path = broken / WEIGHTS["vae"]
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for key, value in load_file(path).items():
        for new, old in new_to_old.items():
            key = key.replace(new, old)
        tensors[key] = value
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, path)
    path = broken / WEIGHTS["text_encoder"]
    tensors = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, path)
    for part in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(LOADERS[part](broken)), nnx.state(getattr(loaded, part)))


def test_tokenizer_from_vocab_and_merges(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    (start, cat, end) = load_tokenizer(tmp_path)("cat")["input_ids"]
    vocab = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
    assert (start, cat, end) == (vocab["<|startoftext|>"], vocab["cat</w>"], vocab["<|endoftext|>"])
    assert tokenizer("cat")["input_ids"] == [start, cat, end]


def kernel_name(tensors) -> str:
    """A weight whose layout differs between torch and here."""
    return next(name for name in sorted(tensors) if name.endswith(("conv1.weight", "mlp.fc1.weight")))


def edit_weights(change):
    def damage(folder: Path, part: str) -> None:
        tensors = load_file(folder / WEIGHTS[part])
        change(tensors, kernel_name(tensors))
        save_file(tensors, folder / WEIGHTS[part])

    return damage


def widen(tensors, name):
    tensors[name] = np.concatenate([tensors[name], tensors[name]])


def flatten(tensors, name):
    tensors[name] = tensors[name].reshape(1, *tensors[name].shape)


def add(tensors, _):
    tensors["stray.weight"] = np.zeros(3, np.float32)


def duplicate(tensors, name):
    tensors["text_model." + name] = tensors[name]


def truncate(folder: Path, part: str) -> None:
    path = folder / WEIGHTS[part]
    path.write_bytes(path.read_bytes()[:-100])


def scramble(folder: Path, part: str) -> None:
    (folder / WEIGHTS[part]).write_bytes(b"not safetensors at all")


def empty(folder: Path, part: str) -> None:
    (folder / WEIGHTS[part]).write_bytes(b"")


def as_bin(folder: Path, part: str) -> None:
    path = folder / WEIGHTS[part]
    path.rename(path.with_suffix(".bin"))


DAMAGES = {
    "missing": (edit_weights(lambda tensors, name: tensors.pop(name)), "missing tensors"),
    "extra": (edit_weights(add), "stray.weight"),
    "wide": (edit_weights(widen), "has shape"),
    "rank": (edit_weights(flatten), "has shape"),
    "truncated": (truncate, "not a whole safetensors file"),
    "scrambled": (scramble, "not a whole safetensors file"),
    "empty": (empty, "not a whole safetensors file"),
    "bin": (as_bin, "convert .bin"),
}


@pytest.mark.parametrize(
    ("part", "kind"),
    [("text_encoder", kind) for kind in DAMAGES]
    + [(p, k) for p in ("unet", "vae") for k in ("missing", "wide", "bin")],
)
def test_damaged_weights_are_refused(part, kind, broken):
    damage, words = DAMAGES[kind]
    name = kernel_name(load_file(broken / WEIGHTS[part]))
    damage(broken, part)
    with pytest.raises(PSAError) as caught:
        LOADERS[part](broken)
    text = str(caught.value)
    assert "\n" not in text
    assert str(broken / WEIGHTS[part]) in text
    assert words in text
    if words in ("missing tensors", "has shape"):
        assert name.removeprefix("text_model.") in text


def test_one_parameter_under_two_names_is_refused(broken):
    edit_weights(duplicate)(broken, "text_encoder")
    with pytest.raises(PSAError, match="are the same parameter"):
        load_text_encoder(broken)


def edit_json(file: str, **changes):
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def remove(name: str):
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("model_index.json"), ["model_index.json", "file not found"]),
        (remove("unet"), ["unet/config.json", "file not found"]),
        (remove("vae"), ["vae/config.json", "file not found"]),
        (remove("text_encoder"), ["text_encoder/config.json", "file not found"]),
        (remove("scheduler"), ["scheduler_config.json", "file not found"]),
        (remove("tokenizer"), ["tokenizer", "not found"]),
        (write("unet/config.json", "{,}"), ["unet/config.json", "not valid JSON"]),
        (write("vae/config.json", "[1]"), ["vae/config.json", "expected a JSON object"]),
        (write("tokenizer/tokenizer.json", "{}"), ["tokenizer", "not a CLIP tokenizer"]),
        (edit_json("unet/config.json", sample_size="8"), ["unet/config.json", "sample_size = '8'"]),
        (write("unet/config.json", '{"a": 1, "a": 2}'), ["unet/config.json", "'a' is given twice"]),
        (write("unet/config.json", '{"a": ' * 9000 + "1" + "}" * 9000), ["unet/config.json", "nested deeper"]),
        (write("model_index.json", '{"a": NaN}'), ["model_index.json", "holds NaN"]),
        (write("scheduler/scheduler_config.json", "[" * 9000), ["scheduler_config.json", "nested deeper"]),
        (write("tokenizer/tokenizer_config.json", "[]"), ["tokenizer_config.json", "expected a JSON object"]),
        (write("tokenizer/special_tokens_map.json", "{'"), ["special_tokens_map.json", "not valid JSON"]),
        (edit_json("unet/config.json", class_embed_type="timestep"), ["unet/config.json", "class_embed_type"]),
        (edit_json("vae/config.json", shift_factor=0.1), ["vae/config.json", "shift_factor"]),
        (edit_json("text_encoder/config.json", hidden_act="relu"), ["text_encoder/config.json", "relu"]),
        (edit_json("model_index.json", _class_name="StableDiffusionXLPipeline"), ["StableDiffusionXLPipeline"]),
        (edit_json("model_index.json", _class_name=None), ["pipeline class None"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_folders_are_refused_in_one_line(damage, words, broken):
    damage(broken)
    with pytest.raises(PSAError) as caught:
        load_stable_diffusion(broken)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in [str(broken), *words]), text


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(PSAError, match="no such model folder") as caught:
        load_stable_diffusion(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)


def test_vocabulary_without_merges_is_refused(tmp_path):
    small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(PSAError, match=r"merges\.txt: file not found"):
        load_tokenizer(tmp_path)


def test_parts_of_different_models_are_refused(broken, loaded, tmp_path):
    vae = VAE(VAEConfig(**VAES["shallow"]), rngs=nnx.Rngs(0))  # three latent channels
    save_stable_diffusion(dataclasses.replace(loaded, vae=vae), tmp_path / "vae")
    with pytest.raises(PSAError, match="latent_channels"):
        load_stable_diffusion(tmp_path / "vae")

    config = dataclasses.replace(loaded.text_encoder.config, vocab_size=100)
    text_encoder = CLIPText(config, rngs=nnx.Rngs(0))
    save_stable_diffusion(dataclasses.replace(loaded, text_encoder=text_encoder), tmp_path / "text")
    with pytest.raises(PSAError, match="vocab_size is 100"):
        load_stable_diffusion(tmp_path / "text")


def test_saving_never_overwrites_and_leaves_nothing_half_written(loaded, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for name in ("full", "file"):
        with pytest.raises(PSAError, match="not an empty folder"):
            save_stable_diffusion(loaded, tmp_path / name)
    assert (tmp_path / "full" / "note.txt").read_text() == "keep me"

    class Failing:
        def save_pretrained(self, _):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_stable_diffusion(dataclasses.replace(loaded, tokenizer=Failing()), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_vae_that_nobody_needs_stays_in_its_file(sd1, loaded):
    """Its configuration and its file are there, its weights are shapes; the other models are whole."""
    model = load_stable_diffusion(sd1[0], abstract=("vae",))
    assert model.vae.config == loaded.vae.config
    shapes, whole = jax.tree.leaves(nnx.state(model.vae)), jax.tree.leaves(nnx.state(loaded.vae))
    assert [leaf.shape for leaf in shapes] == [leaf.shape for leaf in whole]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert model.vae_tensors.keys() == loaded.vae_tensors.keys()
    for name in ("unet", "text_encoder"):
        both = (jax.tree.leaves(nnx.state(getattr(each, name))) for each in (model, loaded))
        assert all(np.array_equal(*pair) for pair in zip(*both, strict=True))
