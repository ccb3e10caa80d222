"""LoRA files of UNets and text encoders, merged into the weights at load.

    W + scale · (alpha / r) · B A          r: rank; alpha: r unless the file says otherwise

Supported are kohya's files, every format of diffusers, and peft's folders. Other tensors are refused by name.
Source: Hu et al., LoRA, arXiv 2106.09685.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.interop.lora_names import MODEL_PREFIXES, PEFT_PREFIX, Layers, Place, split_name
from psa_jax.interop.lora_settings import Settings, read_settings
from psa_jax.interop.parts import MODELS
from psa_jax.interop.weights import Index, Tensor, Tensors, shown
from psa_jax.json_input import parse_json, read_json
from psa_jax.tensor_file import MAX_HEADER, Entry, Header, all_finite, read_float32, read_header

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"
_WHOLE_NUMBERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_log = logging.getLogger(__name__)


class Update(NamedTuple):
    """Update of one weight: factor · up · down, with up [out, r] and down [r, in] or [r, in, h, w]."""

    up: np.ndarray
    down: np.ndarray
    factor: float


class _File(NamedTuple):
    """A safetensors file.

    Attributes:
      config: content of peft's configuration beside it; None for other formats.
      model: the model that all its tensors belong to, if the folder's name gives it.
    """

    path: Path
    config: Mapping[str, Any] | None = None
    model: str | None = None


def merge_lora(unet: Tensors, path: Path, scale: float = 1.0) -> Tensors:
    """A UNet's tensors with a LoRA that changes the UNet alone; arguments and errors as `merge_lora_into`."""
    return merge_lora_into({"unet": unet}, path, scale)["unet"]


def merge_lora_into(models: Mapping[str, Tensors], path: Path, scale: float = 1.0) -> dict[str, Tensors]:
    """Tensors of a pipeline's models with a LoRA added. Weights are still read lazily.

    A missing alpha counts as the rank, and a warning is logged.

    Args:
      models: name of `MODELS` -> tensors under diffusers' names.
      path: a safetensors file, a folder with one, a folder of peft, or a folder with one of those for each model
        (`unet/`, `text_encoder/`).
      scale: strength; 1 is as trained, 0 is the base model.

    Returns:
      The same models, with updated tensors.

    Raises:
      PSAError: an unused tensor, one without its partner, one that does not fit the model, or another method than LoRA.
    """
    if not math.isfinite(scale):
        raise PSAError(f"the strength of a LoRA is {scale}; give a finite number")
    layers = Layers(models)
    merged = {model: dict(tensors.by_name) for model, tensors in models.items()}
    for file in _files(Path(path)):
        for place, update in _read(file, layers).items():
            name, shape = layers.find(file.path, place)
            found = (update.up.shape[0], *update.down.shape[1:])
            if found != shape:
                raise PSAError(
                    f"{file.path}: the update of {place.layer} has shape {found}, the {place.model}'s weight {shape}; "
                    "the LoRA is for another base model"
                )
            weight = merged[place.model][name]
            merged[place.model][name] = _updated(weight, update, scale, f"{file.path}: {place.layer}")
    return {model: Tensors(models[model].where, by_name) for model, by_name in merged.items()}


def lora_hash(path: Path) -> str:
    """sha256 over the content of the files that `merge_lora_into` reads, in their order."""
    digest = hashlib.sha256()
    for file in _files(Path(path)):
        with file.path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
        digest.update(json.dumps([file.model, file.config], sort_keys=True).encode())
    return digest.hexdigest()


def _updated(weight: Tensor, update: Update, scale: float, where: str) -> Tensor:
    def read(index: Index) -> np.ndarray:
        base = weight.read(index).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # not finite, and refused
            delta = np.tensordot(update.up[index[0]], update.down[(slice(None), *index[1:])], 1)
            total = base + np.float32(scale * update.factor) * delta
        if not all_finite(total) and all_finite(base):
            raise PSAError(f"{where} goes beyond float32 when it is merged; give a smaller strength, or another file")
        return total

    return Tensor(weight.shape, read)


def _files(path: Path) -> list[_File]:
    """The safetensors files of a path, as `merge_lora_into` defines it."""
    if not path.is_dir():
        if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
            return [_peft(path.parent)]
        return [_File(_safetensors(path))]
    if (path / PEFT_CONFIG).is_file():
        if (path / FILE_NAME).is_file():
            raise PSAError(f"{path}: holds {FILE_NAME} and a LoRA of peft; give the file that you mean")
        return [_peft(path)]
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if FILE_NAME in names or len(names) == 1:
        return [_File(path / (FILE_NAME if FILE_NAME in names else names[0]))]
    if names:
        raise PSAError(f"{path}: holds {shown(set(names))}; give the file that you mean")
    if models := [model for model in MODELS if model != "vae" and (path / model / PEFT_CONFIG).is_file()]:
        return [_peft(path / model, model) for model in models]
    pickles = sorted(file for end in ("bin", "pt", "ckpt") for file in path.glob(f"*.{end}"))
    return [_File(_safetensors(pickles[0] if pickles else path / FILE_NAME))]


def _peft(folder: Path, model: str | None = None) -> _File:
    path = folder / PEFT_FILE
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"
    return _File(_safetensors(path), read_json(folder / PEFT_CONFIG), model)


def _safetensors(path: Path) -> Path:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise PSAError(
            f"{path} is a pickle, which can run code, and is not read: write it again with "
            f'safetensors.torch.save_file(torch.load("{path.name}", weights_only=True), "{path.stem}.safetensors")'
        )
    if not path.is_file():
        raise PSAError(f"{path}: LoRA weights not found; give a .safetensors file, or a folder with one")
    return path


def _read(file: _File, layers: Layers) -> dict[Place, Update]:
    """Updates of a file by layer. Every tensor of the file is used exactly once."""
    path, header = file.path, read_header(file.path)
    if not header.tensors:
        raise PSAError(f"{path}: the file holds no tensors")
    found = _placed(file, header, layers)
    alphas = {place: _alpha(path, *parts["alpha"]) for place, parts in found.items() if "alpha" in parts}
    settings = _settings(file, header, found)
    if alphas and (settings or len(alphas) < len(found)):
        without = {place.layer for place in found.keys() - alphas.keys()}
        other = "its configuration gives alpha, too" if settings else f"{shown(without)} have none"
        raise PSAError(
            f"{path}: alpha is ambiguous: tensors give it for {shown({p.layer for p in alphas})}, {other}; "
            "get the file again, from where it was trained"
        )
    updates, unknown = {}, 0
    for place, parts in found.items():
        for part, name in (("down", "lora_A tensor (lora_down)"), ("up", "lora_B tensor (lora_up)")):
            if part not in parts:
                raise PSAError(f"{path}: {place.layer} has no {name}; the file is incomplete, download it again")
        down, up = (read_float32(path, *parts[part]) for part in ("down", "up"))
        rank = down.shape[0] if down.ndim else 0
        if up.shape[1:2] != (rank,) or up.size != up.shape[0] * rank:
            raise PSAError(f"{path}: {place.layer}: shapes {up.shape} and {down.shape} of its tensors do not multiply")
        if place in alphas:
            factor = alphas[place] / rank
        elif place.model in settings:
            factor = settings[place.model].factor(place.layer, rank)
        else:
            factor, unknown = 1.0, unknown + 1
        updates[place] = Update(up.reshape(-1, rank), down, factor)
    if unknown:
        _log.warning(
            f"{path}: does not say alpha for {unknown} of its {len(found)} layers; it is taken to be the rank (scale 1)"
        )
    return updates


def _placed(file: _File, header: Header, layers: Layers) -> dict[Place, dict[str, tuple[str, Entry]]]:
    """Names and entries of a file's tensors by layer and part. A layer may occur under two names with equal values."""
    path = file.path
    named = {name: split_name(path, name) for name in header.tensors}
    model = file.model
    if file.config is not None:
        named = {name: (layer.removeprefix(PEFT_PREFIX), part) for name, (layer, part) in named.items()}
        model = model or _model_of(file, header, named, layers)
    elif stray := {name for name in named if name.startswith(PEFT_PREFIX)}:
        raise PSAError(f"{path}: {shown(stray)} is of peft, whose {PEFT_CONFIG} holds alpha; put that file beside it")
    bare = {name for name in named if not name.startswith(MODEL_PREFIXES)}
    if file.config is None and bare and len(bare) < len(named):
        # diffusers ignores those silently.
        raise PSAError(f"{path}: {shown(bare)} does not say its model, as others of the file do; get the file again")
    found: dict[Place, dict[str, tuple[str, Entry]]] = {}
    for name, (layer, part) in named.items():
        place = layers.place(layer, model)
        layers.find(path, place)
        other, entry = found.setdefault(place, {}).setdefault(part, (name, header.tensors[name]))
        if other != name and not np.array_equal(
            read_float32(path, name, header.tensors[name]), read_float32(path, other, entry)
        ):
            raise PSAError(f"{path}: {other} and {name} are the same parameter with other numbers; delete one of them")
    return found


def _model_of(file: _File, header: Header, named: Mapping[str, tuple[str, str]], layers: Layers) -> str:
    """Name of the model that a folder of peft changes: the only one with all its layers in these shapes.

    Raises:
      PSAError: no such model, or more than one.
    """

    def fits(model: str) -> bool:
        known = layers.by_model[model]
        for name, (layer, part) in named.items():
            place, shape = layers.place(layer, model), header.tensors[name].shape
            if place.layer not in known or not shape:
                return False
            wanted = known[place.layer].shape
            if part != "alpha" and (shape[0] != wanted[0] if part == "up" else shape[1:] != wanted[1:]):
                return False
        return True

    models = [model for model in layers.by_model if fits(model)]
    if len(models) > 1:  # SDXL's text encoders, in models so small that they have one size
        about = (file.config or {}).get("auto_mapping")
        name = about.get("base_model_class") if isinstance(about, Mapping) else None
        models = [model for model in models if MODELS[model].class_name == name] or models
    if len(models) == 1:
        return models[0]
    if models:
        raise PSAError(f"{file.path}: fits {' and '.join(models)}; give a folder that holds it as {models[0]}/, say")
    layer = shown({layer for layer, _ in named.values()})
    raise PSAError(
        f"{file.path}: no model here has all its layers ({layer}) in these shapes; the LoRA is for another base model"
    )


def _settings(file: _File, header: Header, found: Mapping[Place, Any]) -> dict[str, Settings]:
    """Settings by model, from peft's configuration beside the file or in its metadata."""
    models = {place.model for place in found}
    if file.config is not None:
        where = f"{file.path.parent / PEFT_CONFIG}"
        return dict.fromkeys(models, read_settings(file.config, where))
    if _METADATA not in header.metadata:
        return {}
    where = f"{file.path}: its {_METADATA}"
    values = parse_json(header.metadata[_METADATA], where, limit=MAX_HEADER)
    by_model: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        model, _, key = name.rpartition(".") if "." in name else ("unet", "", name)
        if by_model.setdefault(model, {}).setdefault(key, value) is not value:
            raise PSAError(f"{where}: say {key} twice, with unet. and without; delete one of them")
    return {model: read_settings(by_model[model], where) for model in models if model in by_model}


def _alpha(path: Path, name: str, entry: Entry) -> float:
    """Value of an alpha tensor, which is a scalar, also of a whole-number type (kohya's scripts)."""
    if math.prod(entry.shape) != 1:
        raise PSAError(f"{path}: {name} has shape {entry.shape}, but alpha is one number; get the file again")
    if entry.dtype in _WHOLE_NUMBERS:
        return float(np.fromfile(path, _WHOLE_NUMBERS[entry.dtype], 1, offset=entry.start).item())
    return float(read_float32(path, name, entry).item())
