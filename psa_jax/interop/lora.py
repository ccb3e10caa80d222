"""LoRA files of the UNet in diffusers' formats, merged into the weights at load.

    W + scale · (alpha / r) · B A          r: rank; alpha: r unless the file says otherwise

Read are today's names (`unet.….to_q.lora_A.weight`), those before them (`unet.….to_q.lora.down.weight`) and the oldest,
of attention processors (`….processor.to_q_lora.down.weight`), with or without the prefix `unet.`.
Source: Hu et al., LoRA, arXiv 2106.09685.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from psa_jax.errors import PSAError
from psa_jax.interop.weights import Index, Tensor, Tensors, open_tensors, shown

FILE_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_OLD = {f".to_{x}_lora.": f".to_{x}.lora." for x in "qkv"} | {".to_out_lora.": ".to_out.0.lora.", ".processor.": "."}
_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora.alpha": "alpha",
    ".alpha": "alpha",
}


class Update(NamedTuple):
    """What is added to one weight: factor · up · down. `down` is [r, in] or [r, in, h, w]."""

    up: np.ndarray  # [out, r]
    down: np.ndarray
    factor: float


def merge_lora(unet: Tensors, path: Path, scale: float = 1.0) -> Tensors:
    """The UNet's tensors (diffusers' names) with a LoRA added; they are still read only when asked for.

    Args:
      path: a safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`.
      scale: strength; 1 is as trained, 0 is the UNet without it.

    Raises:
      PSAError: a tensor of the file that is not used, lacks its partner or does not fit the UNet.
    """
    if path.is_dir():
        path = path / FILE_NAME
    merged = dict(unet.by_name)
    for name, update in read_lora(path).items():
        if name not in merged:
            raise PSAError(f"{path}: {name} is not a weight of the UNet; the LoRA is for another base model")
        shape = (update.up.shape[0], *update.down.shape[1:])
        if merged[name].shape != shape:
            raise PSAError(
                f"{path}: the update of {name} has shape {shape}, the UNet's weight {merged[name].shape}; "
                "the LoRA is for another base model"
            )
        merged[name] = _updated(merged[name], update._replace(factor=scale * update.factor))
    return Tensors(unet.where, merged)


def _updated(weight: Tensor, update: Update) -> Tensor:
    def read(index: Index) -> np.ndarray:
        delta = np.tensordot(update.up[index[0]], update.down[(slice(None), *index[1:])], 1)
        return weight.read(index).astype(np.float32) + np.float32(update.factor) * delta

    return Tensor(weight.shape, read)


def read_lora(path: Path) -> dict[str, Update]:
    """Name of a UNet weight -> its update; every tensor of the file is used exactly once."""
    tensors = open_tensors(path).renamed(lambda name: _our_name(path, name)).by_name
    metadata = _metadata(path)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    if not modules:
        raise PSAError(f"{path}: the file holds no tensors")
    with_alpha = {module for module in modules if f"{module}.alpha" in tensors}
    if with_alpha and (metadata or len(with_alpha) < len(modules)):
        without = "its metadata give alpha too" if metadata else f"{shown(set(modules) - with_alpha)} have none"
        raise PSAError(f"{path}: alpha is ambiguous: tensors give it for {shown(with_alpha)}, {without}")
    updates = {}
    for module in modules:
        for part, name in (("down", "lora_A"), ("up", "lora_B")):
            if f"{module}.{part}" not in tensors:
                raise PSAError(f"{path}: {module} has no {name} tensor; the file is incomplete, download it again")
        up, down = (np.asarray(tensors[f"{module}.{part}"].all(), np.float32) for part in ("up", "down"))
        rank = down.shape[0]
        if up.ndim < 2 or up.size != up.shape[0] * rank:
            raise PSAError(f"{path}: {module}: shapes {up.shape} and {down.shape} of its two tensors do not multiply")
        alpha = metadata.alpha(module, rank)
        if module in with_alpha:
            alpha = float(tensors[f"{module}.alpha"].all().item())
        root = math.sqrt(rank) if metadata.rslora else rank
        updates[f"{module}.weight"] = Update(up.reshape(-1, rank), down, alpha / root)
    return updates


def _our_name(path: Path, name: str) -> str:
    """`module.down`, `module.up` or `module.alpha` for a tensor of the file."""
    if name.startswith(("lora_unet_", "lora_te")):
        raise PSAError(
            f"{path}: {name} is of the kohya format; convert the file first: in diffusers, load_lora_weights, then "
            "save_lora_weights"
        )
    if name.startswith("text_encoder"):
        raise PSAError(f"{path}: {name} changes a text encoder; only a LoRA of the UNet is supported")
    module = name.removeprefix("unet.")
    for old, new in _OLD.items():
        module = module.replace(old, new)
    for end, part in _ENDS.items():
        if module.endswith(end):
            return f"{module.removesuffix(end)}.{part}"
    raise PSAError(f"{path}: {name} is no tensor of a LoRA in diffusers' format (lora_A, lora_B, alpha)")


class _Metadata(NamedTuple):
    """What peft's configuration in the file says of the scale."""

    default: float | None = None
    patterns: Mapping[str, float] = {}
    rslora: bool = False

    def alpha(self, module: str, rank: int) -> float:
        for pattern, value in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(rank if self.default is None else self.default)

    def __bool__(self) -> bool:
        return self != _Metadata()


def _metadata(path: Path) -> _Metadata:
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        return _Metadata()
    try:
        values: dict[str, Any] = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
        for key in ("use_dora", "lora_bias"):
            if values.get(key):
                raise PSAError(f"{path}: {key} = {values[key]!r} is not supported (only plain LoRA)")
        return _Metadata(values.get("lora_alpha"), values.get("alpha_pattern") or {}, bool(values.get("use_rslora")))
    except (json.JSONDecodeError, AttributeError) as error:
        raise PSAError(f"{path}: its {_METADATA} cannot be read; the file is damaged, download it again") from error
