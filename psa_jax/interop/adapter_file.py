"""The native adapter file: one safetensors file with torch's tensor names and orientation, and metadata.

Imports neither JAX nor torch: both runtimes read files with the same checks.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from psa_jax.categories import CATEGORIES
from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.json_input import parse_json
from psa_jax.models.adapter_config import ADDED_SIZES, GATE_HIDDEN, PLAIN, AdapterConfig, Layers
from psa_jax.tensor_file import MAX_HEADER, all_finite, read_float32, read_header, require_finite

FORMAT = "psa_jax.adapter/1"
ADAPTER_FILE = "psa_adapter.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = {
    "psa_adapter.bin": "the torch original's {0}; bring it in with psa-jax import {0} --model=DIR --out=FILE",
    "ip_adapter.safetensors": "{0}, an IP-Adapter, which stock diffusers loads (pipe.load_ip_adapter); give the native "
    "file, or the run that it was exported from",
    "model_index.json": "a whole model; if it was made for one user (export --format=baked), use it as --model, "
    "without --adapter",
}
"""Files of other formats that a folder may hold in place of the native file -> what they are and how to use them."""
Tensors = dict[str, np.ndarray]


class _Rule(NamedTuple):
    """Requirement for a value of the metadata: a predicate, and its description in errors."""

    holds: Callable[[Any], bool]
    what: str


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 24


def _are_layers(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and len(value) > 0 and all(_is_size(size) for pair in value for size in pair)


_TEXT = _Rule(lambda value: isinstance(value, str), "a text")
_SIZE = _Rule(_is_size, "a whole number above zero")
_OBJECT = _Rule(lambda value: isinstance(value, dict), "an object")
_METADATA = {
    "kind": _TEXT,
    "tokens": _Rule(lambda value: type(value) is int and 0 <= value < 1 << 24, "a whole number"),
    "user_dim": _SIZE,
    "cross_dim": _SIZE,
    "layers": _Rule(_are_layers, "a list of pairs of whole numbers above zero"),
    "qk_dim": _Rule(lambda value: value is None or _is_size(value), "null or a whole number above zero"),
    "hidden": _SIZE,
    "gate": _TEXT,
    "mixing": _Rule(lambda value: isinstance(value, bool), "true or false"),
    "pooled": _SIZE,
    "base_model": _TEXT,
    "family": _TEXT,
    "encoder": _TEXT,
    "encoder_fingerprint": _TEXT,
    "standardised": _Rule(lambda value: isinstance(value, bool), "true or false"),
    "own_bans": _Rule(lambda value: isinstance(value, bool), "true or false"),
    "steps": _Rule(lambda value: type(value) is int, "a whole number"),
    "objective": _OBJECT,
    "versions": _OBJECT,
}
"""Metadata keys that this package reads. Other keys are kept and not checked."""


def tensor_name(parameter: str, index: int, *, before_unet: bool) -> str:
    """Tensor name of a parameter of an adapter site.

    Args:
      parameter: a key of `AdapterConfig.projections` for its kernel, with `_bias` for its bias.
      index: number of the adapter site.
      before_unet: `AdapterConfig.before_unet`.
    """
    projection = parameter.removesuffix("_bias")
    what = "weight" if projection == parameter else "bias"
    if before_unet:
        return f"prompt_adapter.{projection if projection in PLAIN else projection + '_user'}.{what}"
    return f"psa_adapter.{index}.{projection}_user.0.{what}"


def tensor_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's tensors by name; kernels are [out, in]."""
    width = config.cross_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.by_categories:
        for half, inner in (("user", config.user_dim), ("prompt", width)):
            sizes = (inner, GATE_HIDDEN, len(CATEGORIES))
            for number, (into, out) in zip((0, 2), itertools.pairwise(sizes), strict=True):
                shapes |= {gate_name(half, number, "weight"): (out, into), gate_name(half, number, "bias"): (out,)}
    else:
        shapes = {
            "user_proj.proj.weight": (config.tokens * width, config.user_dim),
            "user_proj.proj.bias": (config.tokens * width,),
            "user_proj.norm.weight": (width,),
            "user_proj.norm.bias": (width,),
        }
    return shapes | _site_shapes(config)


GATE_NAMES = ("user_gate.", "prompt_gate.")
"""What the names of the gate's tensors begin with."""


def gate_name(half: str, number: int, what: str) -> str:
    """Tensor name in one half of the gate by categories.

    Args:
      half: "user" or "prompt".
      number: 0 for the hidden layer, 2 for the one after it.
      what: "weight" or "bias".
    """
    return f"{half}_gate.{number}.{what}"


def _site_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index, site in enumerate(config.adapter_sites):
        for name, (inner, outer, bias) in config.projections(*site).items():
            shapes[tensor_name(name, index, before_unet=config.before_unet)] = (outer, inner)
            if bias:
                shapes[tensor_name(f"{name}_bias", index, before_unet=config.before_unet)] = (outer,)
    return shapes


def constant_keys(config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Shapes by name of the W_k that the torch original stores although a single token needs none."""
    if config.kind != "published" or config.tokens > 1:
        return {}
    return {
        tensor_name("to_k", index, before_unet=False): (width, config.cross_dim)
        for index, (width, _) in enumerate(config.layers)
    }


def write_native(tensors: Tensors, config: AdapterConfig, path: Path, metadata: dict[str, Any]) -> None:
    """Writes the native file, whole or not at all.

    Args:
      tensors: in float32, with the names and shapes of `tensor_shapes`, with or without `constant_keys`.
      config: the adapter's sizes, stored in the metadata.
      path: of the file.
      metadata: JSON values about training, base model and encoder. No profile attributes.

    Raises:
      PSAError: a tensor is not finite, or the path has a pickle's ending.
    """
    if path.suffix in PICKLES:
        raise PSAError(f"{path}: the native format is no pickle; name it .safetensors")
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise PSAError(f"{path}: not written: {name} has values that are not finite; train again")
    described = {
        **metadata,
        "format": FORMAT,
        "kind": config.kind,
        "tokens": config.tokens,
        "user_dim": config.user_dim,
        "cross_dim": config.cross_dim,
        "layers": config.layers,
        "qk_dim": config.qk_dim,
        **{name: value for name, value in config.as_json().items() if name in ADDED_SIZES},
    }
    # One key: safetensors writes several in an order that changes from call to call.
    content = save(tensors, {"psa": json.dumps(described, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)


def find_adapter(path: Path) -> Path:
    """Path of an adapter's native file.

    Args:
      path: the file, or a folder with `psa_adapter.safetensors`.

    Raises:
      PSAError: no such file, or a file of another format; the message says how to use that one.
    """
    if path.is_dir() and not (path / ADAPTER_FILE).is_file():
        for name, what in _FOREIGN.items():
            if (path / name).is_file():
                raise PSAError(f"{path}: no {ADAPTER_FILE} here, but {what.format(path / name)}")
    if path.is_dir():
        inside = sorted(path.glob(f"*/{ADAPTER_FILE}"))
        if inside and not (path / ADAPTER_FILE).is_file():
            raise PSAError(
                f"{path}: no {ADAPTER_FILE} in this folder itself; give {' or '.join(str(p.parent) for p in inside)}"
            )
        path /= ADAPTER_FILE
    if not path.is_file():
        raise PSAError(f"{path}: no such adapter file")
    if path.suffix in PICKLES:
        raise PSAError(
            f"{path}: a pickle may run code and is not opened; bring it in with psa-jax import {path} --model=DIR "
            "--out=FILE"
        )
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a native file; empty for a safetensors file of the torch original.

    Raises:
      PSAError: no such file, another format, or metadata that are damaged or of a newer version.
    """
    if not path.is_file():
        raise PSAError(f"{path}: no such adapter file")
    header = read_header(path)
    metadata = header.metadata
    if any(name.startswith(("ip_adapter.", "image_proj.")) for name in header.tensors):
        raise PSAError(
            f"{path}: an IP-Adapter, which stock diffusers loads (pipe.load_ip_adapter); psa_jax takes the native file "
            "that psa-jax train wrote"
        )
    if "embeddings" in header.tensors:
        raise PSAError(f"{path}: an embedding table and no adapter; a table is given with --table, or as table=")
    if "psa" not in metadata:
        return {}
    about = parse_json(metadata["psa"], f"{path}: its metadata", limit=MAX_HEADER)
    if about.pop("format", None) != FORMAT:
        raise PSAError(f"{path}: its metadata are not of {FORMAT}; read it with the version of psa_jax that wrote it")
    for name, value in about.items():
        if name in _METADATA and not _METADATA[name].holds(value):
            raise PSAError(
                f"{path}: {name} in its metadata is {str(value)[:40]!r}, not {_METADATA[name].what}; "
                "the file is damaged, export the adapter again"
            )
    if "encoder_fingerprint" in about and "encoder" not in about:
        raise PSAError(f"{path}: its metadata name no encoder; the file is damaged, export the adapter again")
    return about


def read_tensors(path: Path, framework: str = "numpy") -> dict[str, Any]:
    """All tensors of an adapter's safetensors file by name, in float32.

    Args:
      framework: "numpy", or "pt" for torch's tensors.

    Raises:
      PSAError: a damaged file, a tensor that is no float of 16 to 64 bits, or one that is not finite in float32.
    """
    tensors = {name: read_float32(path, name, entry) for name, entry in read_header(path).tensors.items()}
    if framework == "pt":
        import torch

        return {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    return tensors


def adapter_hash(tensors: Mapping[str, np.ndarray], config: AdapterConfig) -> str:
    """sha256 of an adapter: its configuration, and the names, shapes and float32 values of its tensors.

    Metadata, the order of tensors and `constant_keys` do not change it.
    """
    digest = hashlib.sha256(json.dumps(config.as_json(), sort_keys=True).encode())
    for name in sorted(tensor_shapes(config)):
        tensor = np.ascontiguousarray(tensors[name], "<f4")
        digest.update(json.dumps([name, tensor.shape]).encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def fitting_config(
    where: Path,
    tensors: Mapping[str, Any],
    about: Mapping[str, Any],
    layers: Layers | None = None,
    cross_dim: int | None = None,
) -> AdapterConfig:
    """Configuration of a native file's adapter. Checks that its tensors are complete and fit the base model.

    Args:
      where: the file, for errors.
      tensors: in float32, of numpy, or of torch on the CPU.
      about: metadata from `read_metadata`. Empty metadata mean a file of the torch original: kind `published`, T from
        its shapes.
      layers, cross_dim: (width, heads) of the base model's cross-attentions, and their width of the text states. None
        takes the file's own.

    Raises:
      PSAError: an adapter for another base model, or missing, extra, misshapen or non-finite tensors.
    """
    own = tuple((width, heads) for width, heads in about.get("layers", layers or ()))
    own_dim = about.get("cross_dim", cross_dim)
    if not own or not own_dim:
        raise PSAError(
            f"{where}: its metadata name no base model; bring it in with psa-jax import {where} --model=DIR --out=FILE"
        )
    if own_dim != (cross_dim or own_dim) or own != (layers or own):
        raise PSAError(
            f"{where}: the adapter is for another base model: {len(own)} cross-attentions of width {own_dim}, this one "
            f"has {len(layers or own)} of width {cross_dim or own_dim}, or others in between"
        )
    gate = about.get("gate", ADDED_SIZES["gate"])
    reading = gate_name("user", 0, "weight") if gate == "categories" else "user_proj.proj.weight"
    projection = tensors.get(reading)
    if projection is None:
        raise PSAError(f"{where}: {reading} is missing, so it is no adapter of PSA, or damaged")
    if projection.ndim != 2 or (gate != "categories" and projection.shape[0] % own_dim):
        raise PSAError(f"{where}: {reading} does not fit a cross-attention width of {own_dim}")
    tokens, user_dim = 0 if gate == "categories" else projection.shape[0] // own_dim, projection.shape[1]
    try:
        added = {name: about.get(name, default) for name, default in ADDED_SIZES.items()}
        kind, qk_dim = about.get("kind", "published"), about.get("qk_dim")
        config = AdapterConfig(kind, tokens, user_dim, own_dim, own, qk_dim, **added)
    except ValueError as error:
        raise PSAError(f"{where}: {error}") from error
    for name, found in (("tokens", tokens), ("user_dim", user_dim)):
        if about.get(name, found) != found:
            raise PSAError(f"{where}: {reading} holds {found} {name}, its metadata say {about[name]}")
    wanted, spare = tensor_shapes(config), constant_keys(config)
    for what, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - wanted.keys() - spare.keys()),
    ):
        if names:
            raise PSAError(f"{where}: {what} tensor {min(names)}; the adapter is for another base model or damaged")
    for name, tensor in tensors.items():
        shape, needed = tuple(tensor.shape), (wanted | spare)[name]
        if shape != needed:
            raise PSAError(f"{where}: {name} has shape {shape}, the base model needs {needed}")
        require_finite(where, name, np.asarray(tensor))
    return config
