"""`StableDiffusion`: a whole pipeline of SD1.x, SD2.x or SDXL, with its tokenizers and hashes."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from psa_jax.errors import PSAError
from psa_jax.interop.parts import MODELS, picture_size, square_side
from psa_jax.interop.weights import Tensor, Tensors, parameter_names
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, model_family
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE


@dataclasses.dataclass
class StableDiffusion:
    """Whole pipeline.

    Attributes:
      folder: its source, a folder or a single file.
      unet, vae, text_encoder, tokenizer: its parts.
      scheduler_config: content of `scheduler_config.json`, as the pipeline corrects it.
      text_encoder_2, tokenizer_2: second ones of SDXL; None for other families.
      force_zeros_for_empty_prompt: zeros replace the text states of an absent negative prompt (SDXL base).
      vae_tensors: the VAE's tensors as in its file; None for a pipeline that was not read from files.
      base_tensors: tensors of UNet and text encoders as in their files, before a LoRA; None likewise.
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
        """sha256 of the base model of an adapter: names, shapes and values of UNet and text encoders.

        Values count as float16, so that a float16 variant has the same hash. Reads every weight again.

        Raises:
          PSAError: a pipeline that was not read from files.
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
        """Whether metadata of an adapter or a run name this pipeline as `base_model`, or name none."""
        # Earlier versions wrote the hash of the files.
        known = about.get("base_model", self.base_hash)
        return known == self.base_hash or known == weights_hash(self.folder)

    def require_base_of(self, path: Path, about: Mapping[str, Any]) -> None:
        """Checks that an adapter was trained for this base model.

        Args:
          path: the adapter's file, for the message.
          about: its metadata.

        Raises:
          PSAError: it was trained for another one.
        """
        if not self.is_base_of(about):
            raise PSAError(f"{path}: the adapter was trained for another base model than {self.folder}")

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
        """Height and width in pixels of pictures by default."""
        return picture_size(self.unet.config, self.vae.config, self.folder)

    @property
    def square_side(self) -> int:
        """Side in pixels of square pictures by default; PSAError if the default is not square."""
        return square_side(self.unet.config, self.vae.config, self.folder)

    def token_ids(self, prompts: list[str]) -> tuple[Int[np.ndarray, "n s"], ...]:
        """Token ids of prompts for each text encoder; arguments and errors as `tokenize`."""
        first = self.tokenize(prompts)
        return (first,) if self.text_encoder_2 is None else (first, self.tokenize_2(prompts))

    def tokenize(self, prompts: list[str]) -> Int[np.ndarray, "n s"]:
        """Token ids of prompts in int32, padded with the tokenizer's pad token and truncated, as in diffusers.

        Raises:
          PSAError: a prompt has characters that are not Unicode.
        """
        return _ids(self.tokenizer, self.text_encoder.config, prompts)

    def tokenize_2(self, prompts: list[str]) -> Int[np.ndarray, "n s"]:
        """Token ids for SDXL's second text encoder, whose tokenizer has another pad token.

        Raises:
          PSAError: as `tokenize`, or a pipeline with one text encoder.
        """
        if self.text_encoder_2 is None:
            raise PSAError(f"{self.folder}: a {self.family} model has one text encoder; tokenize_2 is for SDXL")
        return _ids(self.tokenizer_2, self.text_encoder_2.config, prompts)

    def truncated(self, prompts: list[str]) -> list[str]:
        """Truncated end of each prompt, "" for a prompt that fits into the text encoders; as in diffusers' warnings."""
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
    # The last place holds the end token.
    return [tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in whole]


def check_text(text: str, what: str, advice: str) -> None:
    """Checks that a text has no lone surrogates, which Python makes of foreign bytes and no tokenizer accepts.

    Args:
      text: to check.
      what, advice: start and end of the error.

    Raises:
      PSAError: a lone surrogate.
    """
    if half := re.search("[\ud800-\udfff]", text):
        raise PSAError(f"{what}: character {half.start() + 1} is {half[0]!r}, no Unicode character; {advice}")


def weights_hash(source: Path) -> str:
    """sha256 over the weight files of UNet and text encoders, or over the single file, as earlier versions wrote it."""
    folders = [source / name for name in ("unet", "text_encoder", "text_encoder_2")]
    paths = [source] if source.is_file() else [p for f in folders for p in sorted(f.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
