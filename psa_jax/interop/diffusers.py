"""Loader of pipelines of Stable Diffusion 1.x, 2.x and SDXL: folders in diffusers' layout, and single files.

Also replaces the VAE and merges a LoRA. Re-exports the pipeline (`stable_diffusion`) and its writer (`save_folder`).
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psa_jax.errors import PSAError
from psa_jax.interop.folder import read_folder
from psa_jax.interop.lora import merge_lora_into
from psa_jax.interop.parts import MODELS, Config, Parts, check_parts_fit, load_tokenizer, read_config
from psa_jax.interop.save_folder import config_json, save_stable_diffusion
from psa_jax.interop.single_file import open_single_file, open_vae_file
from psa_jax.interop.stable_diffusion import StableDiffusion, check_text, weights_hash
from psa_jax.interop.weights import (
    Shardings,
    Tensors,
    abstract_model,
    find_weights,
    has_variant,
    load_weights,
    open_tensors,
    parameter_count,
    save_weights,
)
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE
from psa_jax.rules import quoted

__all__ = [
    "TINY",
    "StableDiffusion",
    "abstract_model",
    "check_text",
    "config_json",
    "load_stable_diffusion",
    "load_text_encoder",
    "load_tokenizer",
    "load_unet",
    "load_vae",
    "load_weights",
    "parameter_count",
    "save_stable_diffusion",
    "save_weights",
    "weights_hash",
]

TINY = Path(__file__).parents[1] / "assets" / "tiny"
"""Folder of the embedded base model."""
EMBEDDED = "tiny"
"""Name of the embedded base model, as in `load_stable_diffusion("tiny")`."""


def load_stable_diffusion(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    vae: str | Path | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    sharding: Shardings | None = None,
    abstract: Collection[str] = (),
) -> StableDiffusion:
    """Reads a pipeline: all settings first, with their checks, then the weights one tensor at a time.

    Args:
      source: a folder in diffusers' layout, a single-file `.safetensors` checkpoint of SD1.x or SDXL, or "tiny".
      dtype: of every parameter, independent of the files' type.
      variant: such as "fp16", for `*.fp16.safetensors`. As in diffusers, a part without such a file is read from its
        plain one; at least one part must have the variant.
      vae: another VAE: a folder with config.json and weights (or with `vae/`), or a single `.safetensors` file.
      lora: a LoRA of UNet and text encoders: a file of kohya or diffusers, or a folder of peft.
      lora_scale: strength of the LoRA.
      tokenizer: for a single file, which holds none: a folder with vocab.json and merges.txt (or with `tokenizer/`).
      config: for a single file: a diffusers folder whose JSON files and tokenizers replace the known ones.
      sharding: (path, shape) of a parameter -> its sharding; each process reads only its own parts.
      abstract: names of models, such as "vae", that get shapes in `dtype` in place of weights.

    Raises:
      PSAError: a missing or unsupported file or value, or weights that do not match their configuration.
    """
    source = TINY if str(source) == EMBEDDED else Path(source)
    if source.is_file():
        check_variant(source, variant, () if vae is None else (Path(vae),))
        parts = open_single_file(source, tokenizer and Path(tokenizer), config and Path(config))
    elif tokenizer is not None or config is not None:
        raise PSAError(f"{source}: tokenizer and config are for single files; a folder has its own")
    else:
        parts = open_folder(source, variant, () if vae is None else (Path(vae),))
    if vae is not None:
        vae_config, tensors = _open_vae(Path(vae), parts.configs["vae"], variant)
        parts = dataclasses.replace(
            parts, configs=parts.configs | {"vae": vae_config}, tensors=parts.tensors | {"vae": tensors}
        )
    check_parts_fit(parts)
    base = {name: tensors for name, tensors in parts.tensors.items() if name != "vae"}
    if lora is not None:
        merged = merge_lora_into(base, Path(lora), lora_scale)
        parts = dataclasses.replace(parts, tensors=parts.tensors | merged)
    models = {
        name: _shapes(name, parts.configs[name], dtype)
        if name in abstract
        else _load(name, parts.configs[name], tensors, dtype, sharding)
        for name, tensors in parts.tensors.items()
    }
    return StableDiffusion(
        folder=source,
        scheduler_config=parts.scheduler,
        force_zeros_for_empty_prompt=parts.force_zeros,
        vae_tensors=parts.tensors["vae"].by_name,
        base_tensors=base,
        **models,
        **parts.tokenizers,
    )


def _load(name: str, config: Config, tensors: Tensors, dtype: Any, sharding: Shardings | None = None):
    format_ = MODELS[name]
    return load_weights(abstract_model(format_.model, config), tensors, format_.name, dtype=dtype, sharding=sharding)


def _shapes(name: str, config: Config, dtype: Any):
    shapes = abstract_model(MODELS[name].model, config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def check_variant(source: Path, variant: str | None, others: Collection[Path] = ()) -> None:
    """Checks that a variant exists.

    Args:
      source: folder or single file of the pipeline.
      variant: such as "fp16"; None passes.
      others: sources of parts that replace its own.

    Raises:
      PSAError: neither the folder nor `others` have weights of the variant.
    """
    if variant is None:
        return
    if source.is_file():
        if all(other.is_file() for other in others):
            raise PSAError(f"{source}: variant {quoted(variant)} is for folders; give the file of that variant")
        return
    if not any(
        has_variant(place, variant) for place in (*(source / name for name in MODELS), *map(_vae_folder, others))
    ):
        raise PSAError(f"{source}: no part has weights of the variant {quoted(variant)}; leave it out, or give another")


def open_folder(folder: Path, variant: str | None = None, others: Collection[Path] = ()) -> Parts:
    """Opens a folder in diffusers' layout without reading weights.

    Args:
      folder: of the pipeline.
      variant: as in `load_stable_diffusion`.
      others: sources of parts that replace its own, which may have the variant.

    Raises:
      PSAError: a missing or unsupported file or value.
    """
    if not folder.is_dir():
        way_out = "make it with psa-jax pretrain" if folder == TINY else "give a folder in diffusers' layout"
        raise PSAError(f"{folder}: no such model folder; {way_out}")
    described = read_folder(folder)
    check_variant(folder, variant, others)
    return Parts(
        where=folder,
        pipeline=described.pipeline,
        scheduler=described.scheduler,
        tokenizers={
            name: load_tokenizer(folder, name, class_name) for name, class_name in described.tokenizers.items()
        },
        configs=described.configs,
        tensors={
            name: open_tensors(_weights_of(folder / name, MODELS[name].stem, variant)) for name in described.configs
        },
        force_zeros=described.force_zeros,
    )


def _open_vae(path: Path, config: VAEConfig, variant: str | None) -> tuple[VAEConfig, Tensors]:
    """Configuration and tensors of another VAE. A single file must fit the main model's configuration."""
    if path.is_dir():
        folder = _vae_folder(path)
        return read_config("vae", folder / "config.json"), open_tensors(
            _weights_of(folder, MODELS["vae"].stem, variant)
        )
    return config, open_vae_file(path, config)


def _vae_folder(path: Path) -> Path:
    return path / "vae" if (path / "vae" / "config.json").is_file() else path


def _weights_of(folder: Path, stem: str, variant: str | None) -> Path:
    """Path of a part's weights: in the variant if there are files of it, otherwise without a variant.

    Source: diffusers, `_identify_model_variants`.
    """
    return find_weights(folder, stem, variant if variant is not None and has_variant(folder, variant) else None)


def _load_part(folder: Path, name: str, dtype: Any, variant: str | None):
    config = read_config(name, folder / name / "config.json")
    tensors = open_tensors(find_weights(folder / name, MODELS[name].stem, variant))
    return _load(name, config, tensors, dtype)


def load_unet(folder: Path, *, dtype: Any = jnp.float32, variant: str | None = None) -> UNet:
    """UNet of a diffusers folder, in `dtype`; `variant` and errors as in `load_stable_diffusion`."""
    return _load_part(folder, "unet", dtype, variant)


def load_vae(folder: Path, *, dtype: Any = jnp.float32, variant: str | None = None) -> VAE:
    """VAE of a diffusers folder, in `dtype`; `variant` and errors as in `load_stable_diffusion`."""
    return _load_part(folder, "vae", dtype, variant)


def load_text_encoder(
    folder: Path, name: str = "text_encoder", *, dtype: Any = jnp.float32, variant: str | None = None
) -> CLIPText:
    """Text encoder of a diffusers folder, in `dtype`; `variant` and errors as in `load_stable_diffusion`.

    Args:
      folder: of the pipeline.
      name: "text_encoder" or "text_encoder_2".
    """
    return _load_part(folder, name, dtype, variant)
