"""Folders of released models whose weights are holes: shapes and types of every tensor, and no bytes on the disk."""

import json
import shutil
import struct
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import psa_jax
from support import released_configs as released

TINY = Path(psa_jax.__file__).parent / "assets" / "tiny"

_TEXT = (CLIPTextModel, released.SD15_TEXT)
_MODELS = {
    "sd15": (released.SD15_UNET, released.SD14_VAE, [_TEXT]),
    "sd21": (released.SD21_768_UNET, released.SD14_VAE, [(CLIPTextModel, released.SD21_TEXT)]),
    "sdxl": (
        released.SDXL_UNET,
        released.SDXL_VAE,
        [_TEXT, (CLIPTextModelWithProjection, released.SDXL_TEXT_2)],
    ),
}


def shape_folder(name: str, folder: Path) -> Path:
    """Writes the folder of a released model, in float16, with the tokenizer and scheduler of `tiny`."""
    unet, vae, encoders = _MODELS[name]
    index = json.loads((TINY / "model_index.json").read_text())
    with torch.device("meta"):
        _write(folder / "unet", UNet2DConditionModel.from_config(unet), unet, "diffusion_pytorch_model")
        _write(folder / "vae", AutoencoderKL.from_config(vae), vae, "diffusion_pytorch_model")
        for suffix, (kind, config) in zip(("", "_2"), encoders, strict=False):
            encoder = kind(CLIPTextConfig(**config))
            about = encoder.config.to_dict() | {"architectures": [kind.__name__]}
            _write(folder / f"text_encoder{suffix}", encoder, about, "model")
            shutil.copytree(TINY / "tokenizer", folder / f"tokenizer{suffix}")
            index |= {f"text_encoder{suffix}": ["transformers", kind.__name__]}
            index |= {f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"]}
    if len(encoders) == 2:
        index["_class_name"] = "StableDiffusionXLPipeline"
    shutil.copytree(TINY / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write(folder: Path, model: torch.nn.Module, config: dict, stem: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        kind, size = ("F16", 2) if tensor.is_floating_point() else ("I64", 8)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + size * tensor.numel()]}
        end += size * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / f"{stem}.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole
