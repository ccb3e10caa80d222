"""The parts of a pipeline before any weight is read: configurations, opened tensor files, tokenizers."""

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
    """Today's name of a VAE tensor."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in _OLD_VAE:
        parts[-2] = _OLD_VAE[parts[-2]]
    return ".".join(parts)


def text_name(name: str) -> str:
    """Name here of a text encoder's tensor."""
    return name.removeprefix("text_model.")


def text_file_name(name: str) -> str:
    """The inverse of `text_name`: transformers' layout, in which only the projection is outside the text model."""
    return name if name.startswith("text_projection.") else f"text_model.{name}"


class ModelKind(NamedTuple):
    """How one model of a pipeline is kept in a folder.

    Attributes:
      class_name: its class in diffusers or transformers.
      stem: name of its weight files up to the variant.
      name, file_name: tensor name in the file -> name here, and back.
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
    "unet": ModelKind("diffusers", "UNet2DConditionModel", UNetConfig, UNet, _STEM),
    "vae": ModelKind("diffusers", "AutoencoderKL", VAEConfig, VAE, _STEM, vae_name),
    "text_encoder": ModelKind("transformers", "CLIPTextModel", *_TEXT),
    "text_encoder_2": ModelKind("transformers", "CLIPTextModelWithProjection", *_TEXT),
}
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
# The pipelines of diffusers that have just these parts, by the one that draws from text alone.
CLASSES = {
    SD: (SD, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    SDXL: (SDXL, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}
# The general classes read what a folder's tokenizer.json says and know nothing of CLIP.
_GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", *_GENERAL)
# Pipeline class -> the tokenizer of each text encoder it has.
PIPELINES = {
    SD: {"text_encoder": "tokenizer"},
    SDXL: {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
}


MAX_TOKENIZER = 64 << 20
_SETTINGS = "psa_jax_settings"  # of a tokenizer: what its files do not say
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A pipeline whose weights are open but not read.

    Attributes:
      where: the folder or file, for errors.
      configs, tensors: by names of `MODELS`; tensors are under diffusers' names.
      tokenizers: "tokenizer" and perhaps "tokenizer_2".
      force_zeros: SDXL takes zeros for the text states of an empty negative prompt.
    """

    where: Path
    pipeline: str
    configs: dict[str, Config]
    tensors: dict[str, Tensors]
    tokenizers: dict[str, Any]
    scheduler: dict[str, Any]
    force_zeros: bool


def read_config(kind: str, path: Path) -> Config:
    """The configuration of a model (a name of `MODELS`) from its `config.json`."""
    config = read_json(path)
    if MODELS[kind].config is CLIPTextConfig:  # diffusers goes by the class in model_index.json
        config["architectures"] = [MODELS[kind].class_name]
    return MODELS[kind].config.from_json(config, str(path))


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration in a diffusers folder, in which diffusers itself writes infinities."""
    return read_json(folder / "scheduler" / "scheduler_config.json", constants=True)


def load_tokenizer(folder: Path, name: str = "tokenizer", class_name: str = TOKENIZERS[0]):
    """The CLIP tokenizer of a diffusers folder (no network is used); `class_name` is one of TOKENIZERS."""
    return read_tokenizer(folder / name, class_name)


def read_tokenizer(path: Path, class_name: str = TOKENIZERS[0], **settings: Any):
    """The CLIP tokenizer whose files are in a folder; `settings` replace what its tokenizer_config.json says."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast  # imported late: slow to import

    if not (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
        raise PSAError(f"{path}: tokenizer files not found (vocab.json and merges.txt)")
    if not (path / "tokenizer.json").is_file() and not (path / "merges.txt").is_file():
        raise PSAError(f"{path / 'merges.txt'}: file not found; a tokenizer needs it beside vocab.json")
    tokenizer = PreTrainedTokenizerFast if class_name in _GENERAL else CLIPTokenizer
    return open_tokenizer(tokenizer, "CLIP", path, **settings)


def open_tokenizer(tokenizer: Any, name: str, folder: Path, **settings: Any) -> Any:
    """A tokenizer of transformers from its files, whose JSON is looked at first.

    Args:
      tokenizer: the class.
      name: what to call it in an error.
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
    """Writes a CLIP tokenizer that diffusers opens with transformers 4 and 5: the files that it was read from, if any.

    transformers 5 writes tokenizer.json alone; the CLIPTokenizer of transformers 4 reads vocab.json and merges.txt.

    Args:
      tokenizer: as `read_tokenizer` gives it, without settings of its own, or one made here.
      out: a folder; made where it is missing.
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
    """vocab.json and merges.txt, and added_tokens.json for what is not in the vocabulary, of a tokenizer.json."""
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    added = {each["content"]: each["id"] for each in whole["added_tokens"] if each["content"] not in vocabulary}
    if added:
        (out / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), encoding="utf-8")


def picture_size(unet: UNetConfig, vae: VAEConfig, where: Path) -> tuple[int, int]:
    """Height and width in pixels that a pipeline draws at unless it is told otherwise."""
    if unet.sample_size is None:
        raise PSAError(f"{where}: the UNet has no sample_size; give the size of pictures (--size or --resolution)")
    size = unet.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * vae.downscale, width * vae.downscale


def square_side(unet: UNetConfig, vae: VAEConfig, where: Path) -> int:
    """The same where pictures must be square."""
    height, width = picture_size(unet, vae, where)
    if height != width:
        raise PSAError(f"{where}: the UNet draws {height}x{width} pictures; give a side in pixels (--resolution)")
    return height


def check_parts_fit(parts: Parts) -> None:
    """Parts of different pipelines would fail far from here, or not at all: token ids too high are clamped on a TPU.

    Raises:
      PSAError: two parts do not fit together; the line names both.
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
