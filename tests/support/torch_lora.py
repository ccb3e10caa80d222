"""Random LoRA files and folders in the formats of others, and what diffusers makes of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from psa_jax.interop.parts import MODELS
from psa_jax.interop.weights import Tensors

Pairs = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
TEXT = ("text_encoder", "text_encoder_2")


def text_layer(name: str) -> str:
    """A layer of CLIP as files have named it since long before transformers left `text_model.` out."""
    bare = name.removeprefix("text_model.")
    return bare if bare.startswith("text_projection") else f"text_model.{bare}"


def random_pairs(pipeline, rank: int | Callable[[str], int] = 3) -> Pairs:
    """(model, layer) -> random (down, up), for every linear layer and convolution of UNet and text encoders."""
    generator, pairs = torch.Generator().manual_seed(0), {}
    for model in ("unet", *TEXT):
        for name, layer in getattr(pipeline, model, torch.nn.Module()).named_modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                continue
            out, *inner = layer.weight.shape
            name = name if model == "unet" else text_layer(name)
            r = rank if isinstance(rank, int) else rank(name)
            down = torch.randn(r, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            pairs[model, name] = down, 0.5 * torch.randn(out, r, *(1 for _ in inner[1:]), generator=generator)
    return pairs


def kohya_name(model: str, name: str, first: str = "lora_te_") -> str:
    """`lora_unet_…` and the like, with blocks counted as the name counts them."""
    prefix = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}[model]
    return prefix + name.replace(".", "_")


def kohya(pairs: Pairs, alpha: float | Callable[[str], float] | None = 1.0, **names) -> dict[str, torch.Tensor]:
    """The tensors of a file of kohya's scripts."""
    tensors = {}
    for (model, name), (down, up) in pairs.items():
        flat = kohya_name(model, name, **names)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha(name) if callable(alpha) else alpha)
    return tensors


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up · down, of convolutions what two of them one after the other do."""
    if down.ndim == 2:
        return up @ down
    return torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)


def by_hand(pipeline, pairs: Pairs, factor: Callable[[str, int], float]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights with factor(layer, rank) · up · down added."""
    models = {model for model, _ in pairs}
    weights = {model: _bare(model, getattr(pipeline, model).state_dict()) for model in models}
    for (model, name), (down, up) in pairs.items():
        key = MODELS[model].name(f"{name}.weight")
        weights[model][key] = weights[model][key] + factor(name, down.shape[0]) * product(down, up)
    return weights


def open_pipeline(folder: Path):
    """The pipeline of diffusers, from its folder."""
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fused(folder: Path, path: Path, scale: float):
    """The pipeline of diffusers with a LoRA fused."""
    pipeline = open_pipeline(folder)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


def weights_of(pipeline) -> dict[str, dict[str, torch.Tensor]]:
    """UNet and text encoders of a pipeline of diffusers."""
    return {
        model: _bare(model, getattr(pipeline, model).state_dict())
        for model in ("unet", *TEXT)
        if hasattr(pipeline, model)
    }


def _bare(model: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {MODELS[model].name(name): tensor for name, tensor in tensors.items()}


def assert_weights(ours: dict[str, Tensors], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    """The same weights in every model that is expected."""
    for model, weights in expected.items():
        got = ours[model].renamed(MODELS[model].name).by_name
        assert got.keys() >= weights.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(got[name].all(), weight.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
