"""Parts of a pipeline before weights are read: configurations, opened tensor files, tokenizers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from psa_jax.errors import PSAError
from psa_jax.interop.weights import Tensors
from psa_jax.json_input import read_json
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE

Config = UNetConfig | VAEConfig | CLIPTextConfig

# Attention names of VAEs saved before diffusers 0.15.
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_name(name: str) -> str:
    """Current name of a VAE tensor; files from before diffusers 0.15 have other names for attention."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in _OLD_VAE:
        parts[-2] = _OLD_VAE[parts[-2]]
    return ".".join(parts)


def text_name(name: str) -> str:
    """Parameter name of a text encoder's tensor, from its name in a file."""
    return name.removeprefix("text_model.")


def text_file_name(name: str) -> str:
    """Name in transformers' layout of a text encoder's tensor: the inverse of `text_name`."""
    return name if name.startswith("text_projection.") else f"text_model.{name}"


class ModelFormat(NamedTuple):
    """Classes and files of one model of a pipeline.

    Attributes:
      library: "diffusers" or "transformers".
      class_name: its class there.
      config, model: its classes here.
      stem: name of its weight files up to the variant.
      name, file_name: tensor name in the file -> parameter name, and back.
    """

    library: str
    class_name: str
    config: type[Config]
    model: Callable[..., nnx.Module]
    stem: str
    name: Callable[[str], str] = str
    file_name: Callable[[str], str] = str


_STEM = "diffusion_pytorch_model"
_TEXT = (CLIPTextConfig, CLIPText, "model", text_name, text_file_name)
MODELS = {
    "unet": ModelFormat("diffusers", "UNet2DConditionModel", UNetConfig, UNet, _STEM),
    "vae": ModelFormat("diffusers", "AutoencoderKL", VAEConfig, VAE, _STEM, vae_name),
    "text_encoder": ModelFormat("transformers", "CLIPTextModel", *_TEXT),
    "text_encoder_2": ModelFormat("transformers", "CLIPTextModelWithProjection", *_TEXT),
}
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
# Pipelines of diffusers with the same parts, by the text-to-image pipeline.
CLASSES = {
    SD: (SD, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    SDXL: (SDXL, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}
# General classes, which read a folder's tokenizer.json without knowledge of CLIP.
_GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", *_GENERAL)
# Pipeline class -> text encoder -> its tokenizer.
PIPELINES = {
    SD: {"text_encoder": "tokenizer"},
    SDXL: {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
}


MAX_TOKENIZER = 64 << 20
_SETTINGS = "psa_jax_settings"  # attribute of a tokenizer with settings that are not in its files
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Pipeline whose weights are opened but not read.

    Attributes:
      where: the folder or file, for errors.
      pipeline: SD or SDXL.
      configs, tensors: by names of `MODELS`; tensors have diffusers' names.
      tokenizers: "tokenizer", and "tokenizer_2" for SDXL.
      scheduler: content of `scheduler_config.json`.
      force_zeros: zeros replace the text states of an empty negative prompt (SDXL).
    """

    where: Path
    pipeline: str
    configs: dict[str, Config]
    tensors: dict[str, Tensors]
    tokenizers: dict[str, Any]
    scheduler: dict[str, Any]
    force_zeros: bool


def read_config(model: str, path: Path) -> Config:
    """Configuration of a model from its `config.json`.

    Args:
      model: its name in `MODELS`.
      path: of the file.

    Raises:
      PSAError: an unreadable file, or an unsupported value.
    """
    config = read_json(path)
    if MODELS[model].config is CLIPTextConfig:  # the class is that of model_index.json, as in diffusers
        config["architectures"] = [MODELS[model].class_name]
    return MODELS[model].config.from_json(config, str(path))


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Content of a diffusers folder's `scheduler_config.json`, which may hold infinities."""
    return read_json(folder / "scheduler" / "scheduler_config.json", constants=True)


def load_tokenizer(folder: Path, name: str = "tokenizer", class_name: str = TOKENIZERS[0]):
    """CLIP tokenizer of a diffusers folder. Uses no network.

    Args:
      folder: of the pipeline.
      name: "tokenizer" or "tokenizer_2".
      class_name: one of TOKENIZERS.

    Raises:
      PSAError: as `read_tokenizer`.
    """
    return read_tokenizer(folder / name, class_name)


def read_tokenizer(path: Path, class_name: str = TOKENIZERS[0], **settings: Any):
    """CLIP tokenizer from the files in a folder.

    Args:
      path: of the folder.
      class_name: one of TOKENIZERS.
      settings: replace values of tokenizer_config.json.

    Raises:
      PSAError: missing or damaged files.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast  # imported late: slow to import

    if not (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
        raise PSAError(f"{path}: tokenizer files not found (vocab.json and merges.txt)")
    if not (path / "tokenizer.json").is_file() and not (path / "merges.txt").is_file():
        raise PSAError(f"{path / 'merges.txt'}: file not found; a tokenizer needs it beside vocab.json")
    tokenizer = PreTrainedTokenizerFast if class_name in _GENERAL else CLIPTokenizer
    return open_tokenizer(tokenizer, "CLIP", path, **settings)


def open_tokenizer(tokenizer: Any, name: str, folder: Path, **settings: Any) -> Any:
    """Tokenizer of transformers, after a check of its JSON files.

    Args:
      tokenizer: class in transformers.
      name: of the class, for errors.
      folder: with its files.
      settings: replace values of tokenizer_config.json.

    Raises:
      PSAError: missing or damaged files.
    """
    for file in _TOKENIZER_FILES:
        if (folder / file).is_file():
            read_json(folder / file, limit=MAX_TOKENIZER)
    try:
        opened = tokenizer.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())[:300]
        raise PSAError(f"{folder}: not a {name} tokenizer ({reason}); download it again") from error
    setattr(opened, _SETTINGS, settings)
    return opened


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Writes a CLIP tokenizer for transformers 4 and 5. Copies its source files if there are any.

    transformers 5 writes tokenizer.json alone; the CLIPTokenizer of transformers 4 reads vocab.json and merges.txt.

    Args:
      tokenizer: of `read_tokenizer`, or any other of transformers.
      out: folder; created if missing.
    """
    names = (*_TOKENIZER_FILES, "merges.txt") if getattr(tokenizer, "name_or_path", "") else ()
    files = [file for name in names if (file := Path(tokenizer.name_or_path) / name).is_file()]
    out.mkdir(parents=True, exist_ok=True)
    if files and not getattr(tokenizer, _SETTINGS, None):
        for file in files:
            shutil.copyfile(file, out / file.name)
    else:
        tokenizer.save_pretrained(out)
    clip = type(tokenizer).__name__ not in _GENERAL
    if clip and not ((out / "vocab.json").is_file() and (out / "merges.txt").is_file()):
        _write_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), out)


def _write_vocabulary(whole: dict[str, Any], out: Path) -> None:
    """Writes vocab.json, merges.txt and, for tokens outside the vocabulary, added_tokens.json of a tokenizer.json."""
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    added = {each["content"]: each["id"] for each in whole["added_tokens"] if each["content"] not in vocabulary}
    if added:
        (out / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), encoding="utf-8")


def picture_size(unet: UNetConfig, vae: VAEConfig, where: Path) -> tuple[int, int]:
    """Height and width in pixels of a pipeline's pictures by default.

    Args:
      unet, vae: configurations.
      where: the folder, for errors.

    Raises:
      PSAError: the UNet has no size of its own.
    """
    if unet.sample_size is None:
        raise PSAError(f"{where}: the UNet has no sample_size; give the size of pictures (--size or --resolution)")
    size = unet.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * vae.downscale, width * vae.downscale


def square_side(unet: UNetConfig, vae: VAEConfig, where: Path) -> int:
    """Side in pixels of a pipeline's square pictures; arguments as `picture_size`.

    Raises:
      PSAError: the pictures are not square, or have no size.
    """
    height, width = picture_size(unet, vae, where)
    if height != width:
        raise PSAError(f"{where}: the UNet makes {height}x{width} pictures; give a side in pixels (--resolution)")
    return height


def check_parts_fit(parts: Parts) -> None:
    """Checks that the parts of a pipeline fit together.

    Parts of different pipelines would fail later with an obscure error, or silently: a TPU clamps token ids that are
    too high.

    Raises:
      PSAError: two parts do not fit; the message names both.
    """
    unet, vae = parts.configs["unet"], parts.configs["vae"]
    encoders = {name: parts.configs[name] for name in PIPELINES[parts.pipeline]}
    widths = " + ".join(f"{name} hidden_size" for name in encoders)
    pairs = [
        ("unet cross_attention_dim", unet.cross_attention_dim, widths, sum(e.hidden_size for e in encoders.values())),
        ("unet out_channels", unet.out_channels, "vae latent_channels", vae.latent_channels),
        ("unet in_channels", unet.in_channels, "vae latent_channels", vae.latent_channels),
        ("unet addition_embed_type", unet.addition_embed_type, *_added(parts)),
    ]
    if parts.pipeline == SDXL:
        first, second = encoders.values()
        length = "max_position_embeddings"
        pairs += [
            (f"text_encoder {length}", getattr(first, length), f"text_encoder_2 {length}", getattr(second, length)),
            (
                "unet projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
                "text_encoder_2 projection_dim + 6 · unet addition_time_embed_dim",
                (second.projection_dim or 0) + 6 * (unet.addition_time_embed_dim or 0),
            ),
        ]
    for what, left, other, right in pairs:
        if left != right:
            raise PSAError(f"{parts.where}: {what} is {left}, {other} is {right}; the parts are of different models")
    for encoder, name in PIPELINES[parts.pipeline].items():
        tokenizer, vocab_size = parts.tokenizers[name], encoders[encoder].vocab_size
        if len(tokenizer) > vocab_size:
            raise PSAError(f"{parts.where}: {name} has {len(tokenizer)} tokens, {encoder} vocab_size is {vocab_size}")
        if tokenizer.pad_token_id is None:
            raise PSAError(f"{parts.where}: {name} has no pad token; name one in its tokenizer_config.json")


def _added(parts: Parts) -> tuple[str, str | None]:
    return f"that of {parts.pipeline}", "text_time" if parts.pipeline == SDXL else None
