"""LoRA files and peft's configurations, changed at random: merged, or one line; what is merged is finite."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save
from support.torch_lora import kohya, random_pairs
from test_fuzz_openers import changed_json, changed_tensors, fuzz

from psa_jax.interop.diffusers import open_folder
from psa_jax.interop.lora import FILE_NAME, PEFT_CONFIG, PEFT_FILE, merge_lora_into

NAMES = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "resnets.0.conv1", "q_proj")
NEW_ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale", "", ".lora_A.weight", ".bias")


def dotted(pairs) -> dict[str, torch.Tensor]:
    """The tensors of a file of diffusers."""
    return {
        f"{model}.{name}.lora_{end}.weight": tensor
        for (model, name), pair in pairs.items()
        for end, tensor in zip("AB", pair, strict=True)
    }


def changed_names(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file in which the name, or its end, of one tensor is another's."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    head = name.partition(".lora_")[0].removesuffix(".alpha")
    new = rng.choice([head + rng.choice(NEW_ENDS), name[rng.randrange(len(name)) :], name.replace("_", ".", 1)])
    text = json.dumps({new if key == name else key: value for key, value in header.items()}).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.fixture(scope="module")
def lora_cases(sd1) -> list[tuple[str, Callable[[random.Random], bytes], Callable[[Path], object]]]:
    """File name, what makes a changed file, what opens it: as in the fuzz of the other openers."""
    folder, pipeline = sd1
    pairs = {key: pair for key, pair in random_pairs(pipeline).items() if key[1].endswith(NAMES)}
    models = open_folder(folder).tensors
    about = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_k": 2}, "text_encoder.use_rslora": True}
    about |= {"text_encoder.r": 3, "text_encoder.lora_alpha": 1, "unet.use_dora": False}
    about |= {"unet.target_modules": list(NAMES[:4]), "text_encoder.target_modules": ["q_proj"]}
    files = [
        save(kohya(pairs), {"ss_network_dim": "3"}),
        save(dotted(pairs), {"lora_adapter_metadata": json.dumps(about)}),
    ]

    def change(rng: random.Random) -> bytes:
        return rng.choice([changed_tensors, changed_tensors, changed_names])(rng.choice(files), rng)

    def merge(path: Path):
        merged = merge_lora_into(models, path)
        for model, tensors in merged.items():
            for name, tensor in tensors.by_name.items():
                if tensor is not models[model].by_name[name]:
                    assert np.isfinite(tensor.all()).all()
        return merged

    settings = LoraConfig(r=3, lora_alpha=2).to_dict() | {
        "rank_pattern": {"to_q": 3},
        "alpha_pattern": {"attn1.to_q": 2},
        "target_modules": ["to_q"],
    }
    own = {("base_model.model", name): pair for (model, name), pair in pairs.items() if model == "unet"}
    weights = save(dotted(own), {"format": "pt"})

    def merge_peft(path: Path):
        path.with_name(PEFT_FILE).write_bytes(weights)
        return merge(path.parent)

    made = json.loads(json.dumps(settings, default=str))
    return [
        (FILE_NAME, change, merge),
        (PEFT_CONFIG, lambda rng: changed_json(made, rng), merge_peft),
    ]


def test_a_changed_lora_is_merged_or_refused_in_one_line(lora_cases, tmp_path):
    for number, case in enumerate(lora_cases):
        (tmp_path / str(number)).mkdir()
        counts = fuzz([case], tmp_path / str(number), 50)
        assert all(opened > 3 and refused > 3 for opened, refused in counts.values()), counts


@pytest.mark.slow
def test_two_thousand_changed_loras(lora_cases, tmp_path):
    for number, case in enumerate(lora_cases):
        (tmp_path / str(number)).mkdir()
        print(fuzz([case], tmp_path / str(number), 1000))
