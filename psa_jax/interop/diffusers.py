"""Pipelines of Stable Diffusion 1.x, 2.x and SDXL in diffusers' layout: read strictly, written for diffusers to open.

The same entry reads single-file checkpoints (`psa_jax.interop.single_file`), puts in another VAE and merges a LoRA.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from psa_jax.errors import PSAError
from psa_jax.files import replacing_folder
from psa_jax.interop.folder import read_folder
from psa_jax.interop.lora import merge_lora_into
from psa_jax.interop.parts import (
    MODELS,
    PIPELINES,
    SD,
    SDXL,
    Config,
    Parts,
    check_parts_fit,
    load_tokenizer,
    picture_size,
    read_config,
    save_tokenizer,
    square_side,
)
from psa_jax.interop.single_file import open_single_file, open_vae_file
from psa_jax.interop.weights import (
    Shardings,
    Tensor,
    Tensors,
    abstract_model,
    find_weights,
    has_variant,
    load_weights,
    open_tensors,
    parameter_count,
    parameter_names,
    read_json,
    save_weights,
)
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, VAEConfig, model_family
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
"""The folder of the embedded base model."""
EMBEDDED = "tiny"
"""The name that stands for it: `load_stable_diffusion("tiny")`."""


@dataclasses.dataclass
class StableDiffusion:
    """A whole pipeline.

    Attributes:
      folder: the folder, or the single file, that it was read from.
      text_encoder_2, tokenizer_2: SDXL's second ones, else None.
      force_zeros_for_empty_prompt: an absent negative prompt means zeros in place of text states (SDXL base).
      vae_tensors: the VAE as it is in its file, whatever the model's type; None for a model made here.
      base_tensors: UNet and text encoders as they are in their files, before a LoRA; None likewise.
    """

    folder: Path
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Any
    scheduler_config: dict[str, Any]
    text_encoder_2: CLIPText | None = None
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool = False
    vae_tensors: Mapping[str, Tensor] | None = None
    base_tensors: Mapping[str, Tensors] | None = None

    @functools.cached_property
    def base_hash(self) -> str:
        """sha256 over what an adapter depends on: names, shapes and values of UNet and text encoders.

        Values count as float16, so that a float16 variant is the same base model. Every weight is read once more.
        """
        if self.base_tensors is None:
            raise PSAError(f"{self.folder}: this model was not read from files; save it and open it again")
        digest = hashlib.sha256(b"values as float16")
        for part, tensors in sorted(self.base_tensors.items()):
            by_name = tensors.renamed(MODELS[part].name).by_name
            for name in sorted(parameter_names(getattr(self, part))):
                with np.errstate(over="ignore"):  # infinite in both variants
                    values = by_name[name].all().astype("<f2")
                digest.update(json.dumps([part, name, values.shape]).encode())
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def is_base_of(self, about: Mapping[str, Any]) -> bool:
        """Whether an adapter or a run with these facts (`base_model`) is of this model, as far as they say."""
        # Those of earlier versions have the hash of the files.
        known = about.get("base_model", self.base_hash)
        return known == self.base_hash or known == weights_hash(self.folder)

    @property
    def family(self) -> str:
        """Model family: "sd1", "sd2" or "sdxl" (`model_family`)."""
        return model_family(self.unet.config)

    @property
    def text_encoders(self) -> tuple[CLIPText, ...]:
        """One, or SDXL's two."""
        return tuple(each for each in (self.text_encoder, self.text_encoder_2) if each is not None)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of its pictures unless another size is asked for."""
        return picture_size(self.unet.config, self.vae.config, self.folder)

    @property
    def square_side(self) -> int:
        """The same where pictures must be square."""
        return square_side(self.unet.config, self.vae.config, self.folder)

    def token_ids(self, prompts: list[str]) -> tuple[Int[np.ndarray, "n s"], ...]:
        """Token ids for each text encoder."""
        first = self.tokenize(prompts)
        return (first,) if self.text_encoder_2 is None else (first, self.tokenize_2(prompts))

    def tokenize(self, prompts: list[str]) -> Int[np.ndarray, "n s"]:
        """Token ids int32, padded with the tokenizer's own pad token and truncated, as diffusers does."""
        return _ids(self.tokenizer, self.text_encoder.config, prompts)

    def tokenize_2(self, prompts: list[str]) -> Int[np.ndarray, "n s"]:
        """Token ids for the second text encoder, whose tokenizer pads otherwise than the first."""
        if self.text_encoder_2 is None:
            raise PSAError(f"{self.folder}: a {self.family} model has one text encoder; tokenize_2 is for SDXL")
        return _ids(self.tokenizer_2, self.text_encoder_2.config, prompts)

    def truncated(self, prompts: list[str]) -> list[str]:
        """Of each prompt what does not fit into the text encoders, "" where all does; as diffusers tells it."""
        lost = [_lost(self.tokenizer, self.text_encoder.config, prompts)]
        if self.text_encoder_2 is not None:
            lost.append(_lost(self.tokenizer_2, self.text_encoder_2.config, prompts))
        return [max(of_prompt, key=len) for of_prompt in zip(*lost, strict=True)]


def _ids(tokenizer: Any, config: CLIPTextConfig, prompts: list[str]) -> Int[np.ndarray, "n s"]:
    for number, prompt in enumerate(prompts, start=1):
        check_text(prompt, f"prompt {number} of {len(prompts)}", "give whole characters")
    length = config.max_position_embeddings
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _lost(tokenizer: Any, config: CLIPTextConfig, prompts: list[str]) -> list[str]:
    length = config.max_position_embeddings
    whole = tokenizer(prompts, verbose=False)["input_ids"]
    # The last place is the end token's.
    return [tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in whole]


def check_text(text: str, what: str, advice: str) -> None:
    """Refuses half characters (lone surrogates): no tokenizer takes them, and Python makes them of foreign bytes."""
    if half := re.search("[\ud800-\udfff]", text):
        raise PSAError(f"{what}: character {half.start() + 1} is {half[0]!r}, no Unicode character; {advice}")


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
    """Reads a pipeline. Everything but the weights is read and checked first, then one tensor at a time.

    Args:
      source: a folder in diffusers' layout, a single-file `.safetensors` checkpoint of SD1.x or SDXL, or "tiny".
      dtype: of every parameter, whatever the files hold.
      variant: reads `*.fp16.safetensors` for "fp16"; as in diffusers, a part that has no such file is read without,
        and one at least must have it.
      vae: replaces the VAE: a folder with config.json and weights (or with `vae/`), or a single `.safetensors`.
      lora: a LoRA of UNet and text encoders (kohya's or diffusers' file, or peft's folder), added times `lora_scale`.
      tokenizer: for a single file, which holds none: a folder with vocab.json and merges.txt (or with `tokenizer/`).
      config: for a single file: a diffusers folder whose JSON files and tokenizers replace the known ones.
      sharding: (path, shape) of a parameter -> where it lives; each process reads only the parts it holds.
      abstract: models, such as "vae", whose weights are not read: they are shapes (in `dtype`), for what needs no more.

    Raises:
      PSAError: anything missing, of another kind, or not matching its config.
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
    kind = MODELS[name]
    return load_weights(abstract_model(kind.model, config), tensors, kind.name, dtype=dtype, sharding=sharding)


def _shapes(name: str, config: Config, dtype: Any):
    shapes = abstract_model(MODELS[name].model, config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def check_variant(source: Path, variant: str | None, others: Collection[Path] = ()) -> None:
    """Raises PSAError for a variant that no part of a folder has, nor what takes a part's place (`others`)."""
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
    """Opens a folder in diffusers' layout; no weight is read yet.

    Args:
      others: folders of parts that take the place of its own, where the variant may be, too.
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
        tokenizers={name: load_tokenizer(folder, name, kind) for name, kind in described.tokenizers.items()},
        configs=described.configs,
        tensors={
            name: open_tensors(_weights_of(folder / name, MODELS[name].stem, variant)) for name in described.configs
        },
        force_zeros=described.force_zeros,
    )


def _open_vae(path: Path, config: VAEConfig, variant: str | None) -> tuple[VAEConfig, Tensors]:
    """Another VAE; a single file has no config.json and must fit the one of the main model."""
    if path.is_dir():
        folder = _vae_folder(path)
        return read_config("vae", folder / "config.json"), open_tensors(
            _weights_of(folder, MODELS["vae"].stem, variant)
        )
    return config, open_vae_file(path, config)


def _vae_folder(path: Path) -> Path:
    return path / "vae" if (path / "vae" / "config.json").is_file() else path


def _weights_of(folder: Path, stem: str, variant: str | None) -> Path:
    """The weights of a part in the variant if it has any file of it, else without: as diffusers' pipelines do.

    Source: diffusers, `_identify_model_variants`.
    """
    return find_weights(folder, stem, variant if variant is not None and has_variant(folder, variant) else None)


def _load_part(folder: Path, name: str, dtype: Any, variant: str | None):
    config = read_config(name, folder / name / "config.json")
    tensors = open_tensors(find_weights(folder / name, MODELS[name].stem, variant))
    return _load(name, config, tensors, dtype)


def load_unet(folder: Path, *, dtype: Any = jnp.float32, variant: str | None = None) -> UNet:
    """The UNet of a diffusers folder."""
    return _load_part(folder, "unet", dtype, variant)


def load_vae(folder: Path, *, dtype: Any = jnp.float32, variant: str | None = None) -> VAE:
    """The VAE of a diffusers folder."""
    return _load_part(folder, "vae", dtype, variant)


def load_text_encoder(
    folder: Path, name: str = "text_encoder", *, dtype: Any = jnp.float32, variant: str | None = None
) -> CLIPText:
    """A text encoder of a diffusers folder: `text_encoder` or `text_encoder_2`."""
    return _load_part(folder, name, dtype, variant)


def weights_hash(source: Path) -> str:
    """sha256 over the weight files of UNet and text encoders, or the single file: what earlier versions wrote."""
    folders = [source / name for name in ("unet", "text_encoder", "text_encoder_2")]
    paths = [source] if source.is_file() else [p for f in folders for p in sorted(f.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_stable_diffusion(model: StableDiffusion, out: Path, dtype: Any | None = None) -> None:
    """Writes a folder that diffusers' `from_pretrained` opens.

    JSON files are copied from `model.folder` where it has them, so that keys unknown here survive a round trip.

    Args:
      dtype: of every tensor; None writes what the model holds.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise PSAError(f"{out}: not an empty folder; give a new one")
    with replacing_folder(out) as unfinished:
        _write_parts(model, unfinished, dtype)


def _write_parts(model: StableDiffusion, out: Path, dtype: Any | None) -> None:
    pipeline = SDXL if model.family == "sdxl" else SD
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, kind in MODELS.items():
        if (module := getattr(model, name)) is None:
            continue
        index[name] = [kind.library, kind.class_name]
        (out / name).mkdir(parents=True)
        save_weights(module, out / name / f"{kind.stem}.safetensors", kind.file_name, dtype=dtype)
        source = model.folder / name / "config.json"
        if source.is_file() and read_config(name, source) == module.config:
            shutil.copyfile(source, out / name / "config.json")
        else:
            _write_json(out / name / "config.json", config_json(kind.class_name, module.config))
    for name in PIPELINES[pipeline].values():
        index[name] = ["transformers", "CLIPTokenizer"]
        save_tokenizer(getattr(model, name), out / name)
    settings = dict(model.scheduler_config)
    for key in settings.pop("_use_default_values", ()):  # what the pipeline put in; it will do so again
        del settings[key]
    _write_json(out / "scheduler" / "scheduler_config.json", settings)
    source = model.folder / "model_index.json"
    index |= read_json(source) if source.is_file() else {}
    if isinstance(index["_class_name"], list):  # a class in a file of the source that is not written
        index["_class_name"] = pipeline
    if scheduler := model.scheduler_config.get("_class_name"):
        index["scheduler"] = ["diffusers", scheduler]
    # A safety checker of the source is not written, so it must not be listed.
    index |= dict.fromkeys(["feature_extractor", "image_encoder"], [None, None])
    if pipeline == SD:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = model.force_zeros_for_empty_prompt
    _write_json(out / "model_index.json", index)


def config_json(class_name: str, config: Config) -> dict[str, Any]:
    """A `config.json` for a model made here."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items() if v is not None}
    if isinstance(config, CLIPTextConfig):
        # transformers opens a model in this precision, whatever its file holds; without it, in the file's.
        return {"architectures": [class_name], "model_type": "clip_text_model", "dtype": "float32", **values}
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        values["down_block_types"] = ["DownEncoderBlock2D"] * blocks
        values["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    return {"_class_name": class_name, **values}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
