"""What the base model is: variants as diffusers picks them, and one way to say it for every command."""

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from safetensors.torch import load_file, save_file
from support.torch_ldm import checkpoint
from support.torch_pipelines import state_dicts

from psa_jax.cli import COMMANDS, main
from psa_jax.errors import PSAError
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.interop.parts import MODELS
from psa_jax.interop.single_file import CONFIGS
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.tools import arguments
from psa_jax.tools.configs import read_config

TINY = f"--config={arguments.TINY}"
PLAIN = {name: f"{kind.stem}.safetensors" for name, kind in MODELS.items()}
FP16 = {name: f"{kind.stem}.fp16.safetensors" for name, kind in MODELS.items()}
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def mixed(sd1, tmp_path) -> Path:
    """A UNet of both kinds, whose values differ; a VAE of the variant alone; a text encoder without."""
    folder = shutil.copytree(sd1[0], tmp_path / "mixed")
    tensors = load_file(folder / "unet" / PLAIN["unet"])
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, folder / "unet" / FP16["unet"])
    (folder / "vae" / PLAIN["vae"]).rename(folder / "vae" / FP16["vae"])
    return folder


@pytest.fixture(scope="module")
def single(sd1, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in checkpoint(sd1[1]).items()}, path)
    return path


def assert_same_values(ours, theirs: dict[str, torch.Tensor], part: str) -> None:
    """By their sums: the layouts differ, which other tests compare."""
    found = sorted(float(np.float64(leaf).sum()) for leaf in jax.tree.leaves(nnx.state(ours)))
    stacked = sum(float(tensor.double().sum()) for tensor in theirs.values())
    assert sum(found) == pytest.approx(stacked, abs=1e-6), part


def test_parts_of_a_variant_as_diffusers_picks_them(mixed):
    pipeline = StableDiffusionPipeline.from_pretrained(mixed, variant="fp16", local_files_only=True)
    model = load_stable_diffusion(mixed, variant="fp16")
    for part, tensors in state_dicts(pipeline).items():
        tensors.pop("text_model.embeddings.position_ids", None)
        assert_same_values(getattr(model, part), tensors, part)
    bias = pipeline.unet.conv_in.bias.numpy()
    np.testing.assert_array_equal(model.unet.conv_in.bias[...], bias)
    assert not np.array_equal(bias, load_file(mixed / "unet" / PLAIN["unet"])["conv_in.bias"].numpy())


def test_a_variant_that_no_part_has_is_refused_as_in_diffusers(mixed):
    with pytest.raises(ValueError, match="no such modeling files are available"):
        StableDiffusionPipeline.from_pretrained(mixed, variant="ema", local_files_only=True)
    with pytest.raises(PSAError, match="no part has weights of the variant 'ema'; leave it out") as caught:
        load_stable_diffusion(mixed, variant="ema")
    assert str(mixed) in str(caught.value)


def test_a_pickle_of_the_variant_is_not_passed_over(mixed):
    """diffusers would read it: other weights must not take its place in silence."""
    (mixed / "text_encoder" / "pytorch_model.fp16.bin").touch()
    with pytest.raises(PSAError, match=r"model\.fp16\.safetensors: weights not found; .*is a pickle"):
        load_stable_diffusion(mixed, variant="fp16")


def test_the_advice_for_a_folder_of_a_variant(mixed, capsys):
    words = ["memory", f"{TINY}:smoke", f"--model={mixed}"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "but those of the variant fp16 are there; give --variant=fp16\n" in error
    assert main([*words, "--variant=fp16"]) == 0


def test_another_vae_needs_no_variant(sd1, mixed, single, tmp_path):
    """It has one, or has none, whatever the model has."""
    alone = sd1[0] / "vae"
    for vae in (alone, mixed / "vae", mixed):
        assert load_stable_diffusion(mixed, variant="fp16", vae=vae).vae.config.latent_channels == 4
    assert load_stable_diffusion(sd1[0], vae=alone).vae.config.latent_channels == 4
    with pytest.raises(PSAError, match="give --variant=fp16"):
        load_stable_diffusion(sd1[0], vae=mixed)
    load_stable_diffusion(sd1[0], vae=mixed, variant="fp16")
    load_stable_diffusion(single, vae=mixed, variant="fp16", config=sd1[0])


def flags_of(name: str) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    return {action.dest: action for action in parser._actions}


@pytest.mark.parametrize("name", ["build", "train", "memory", "bench", "demo", "generate", "export", "import"])
def test_every_command_that_opens_a_base_model_has_all_its_flags(name):
    assert set(arguments.BASE_MODEL) <= set(flags_of(name))
    assert list(arguments.BASE_MODEL) == list(BaseModel.__dataclass_fields__)


def test_flags_and_keys_say_the_same(sd1, single, capsys):
    """The configuration's own keys; flags in their place; a configuration from before there were keys."""
    said = {"model": str(single), "tokenizer": str(sd1[0] / "tokenizer"), "model_config": str(sd1[0])}
    config = read_config(str(arguments.TINY), list(said.items()))
    assert BaseModel.from_config(config) == BaseModel.from_config(said) == BaseModel(**said)
    older = read_config(str(arguments.TINY))
    with older.unlocked():
        for name in arguments.BASE_MODEL[1:]:
            del older[name]
    assert BaseModel.from_config(older) == BaseModel("tiny")
    lines = []
    for start in ("--", "--config."):
        words = [f"{start}{name.replace('_', '-') if start == '--' else name}={value}" for name, value in said.items()]
        assert main(["memory", f"{TINY}:smoke", *words]) == 0
        lines.append(json.loads(capsys.readouterr().out) | {"compile_seconds": 0})
    assert main(["memory", f"{TINY}:smoke", f"--model={sd1[0]}"]) == 0
    lines.append(json.loads(capsys.readouterr().out) | {"compile_seconds": 0})
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.parametrize("name", ["model", "vae", "tokenizer", "model_config"])
def test_what_is_not_there_is_said_before_anything_is_read(name, sd1, tmp_path, capsys):
    words = ["train", TINY, f"--model={sd1[0]}", f"--workdir={tmp_path / 'run'}"]
    assert main([*words, f"--{name.replace('_', '-')}={tmp_path / 'absent'}"]) == 1
    assert f"{name} is {tmp_path / 'absent'}, which is not there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_import_refuses_of_the_base_model_what_the_others_refuse(sd1, single, mixed, tmp_path, capsys):
    """Though it reads a configuration only, it takes the same flags."""
    unet = BaseModel(str(sd1[0])).unet_config()
    adapter, number = tmp_path / "adapter.safetensors", iter(range(9))
    save_adapter(Adapter(AdapterConfig.for_unet(unet, user_dim=4), rngs=nnx.Rngs(0)), adapter, {})

    def bring(*words: str) -> tuple[int, str]:
        return main(["import", str(adapter), f"--out={tmp_path / f'{next(number)}.safetensors'}", *words]), (
            capsys.readouterr().err
        )

    assert bring(f"--model={sd1[0]}")[0] == bring(f"--model={mixed}", "--variant=fp16")[0] == 0
    for words, said in (
        ((f"--model={sd1[0]}", "--variant=ema"), "no part has weights of the variant 'ema'; leave it out"),
        (("--model=tiny", "--variant=fp16"), "no part has weights of the variant 'fp16'; leave it out"),
        ((f"--model={single}", "--variant=fp16"), "variant 'fp16' is for folders"),
        ((f"--model={sd1[0]}", f"--vae={tmp_path / 'absent'}"), "absent, which is not there; check the path"),
    ):
        code, error = bring(*words)
        assert code == 1 and said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["0.safetensors", "1.safetensors"]


def test_the_unet_of_a_single_file_without_its_weights(sd1, single):
    expected = load_stable_diffusion(sd1[0]).unet.config
    assert BaseModel(str(single), model_config=str(sd1[0])).unet_config() == expected
    assert BaseModel(str(sd1[0])).unet_config() == expected
    assert BaseModel(str(single)).unet_config() == CONFIGS["StableDiffusionPipeline"]["unet"]


def test_no_model_is_named(capsys):
    assert main(["memory", f"--config={arguments.CONFIGS / 'sd15.py'}"]) == 1
    assert "no base model is named; give --model=PATH" in capsys.readouterr().err
