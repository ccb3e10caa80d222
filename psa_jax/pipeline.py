"""The package in a notebook: a base model with an adapter, drawn from in one line.

    pipe = psa_jax.load("tiny", adapter="adapter.safetensors")
    picture = pipe.generate("a cat in the snow", profile={"age": 9, "gender": "female"}, seed=1)

`psa_jax` itself offers what is here; `psa-jax generate` is the same for files of prompts.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from psa_jax.categories import CATEGORIES
from psa_jax.diffusion.conditioning import prompt_gates
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import find_adapter, fitting_config, read_metadata, read_tensors
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import load_adapter as load_fitting_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.gate_file import require_gate
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.rules import DTYPES

Profile = Mapping[str, Any] | UserProfile
"""Such as `{"age": 9, "gender": "female"}`; see `UserProfile.from_mapping`."""


def load_adapter(path: str | PathLike[str]) -> Adapter:
    """Reads an adapter; its sizes come from the file.

    Args:
      path: a native file, or a folder with `psa_adapter.safetensors`.

    Raises:
      PSAError: no such file, a damaged one, or one of the torch original, which does not name its base model.
    """
    found = find_adapter(_path("adapter", path))
    config = fitting_config(found, read_tensors(found), read_metadata(found))
    return load_fitting_adapter(found, config.layers, config.cross_dim)


def load(
    model: str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    *,
    table: str | PathLike[str] | None = None,
    dtype: str = "float32",
    variant: str | None = None,
    vae: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    model_config: str | PathLike[str] | None = None,
    lora: str | PathLike[str] | None = None,
    lora_scale: float = 1.0,
) -> "Pipeline":
    """Loads a base model and, with `adapter`, an adapter that was trained for it.

    Args:
      model: a folder in diffusers' layout, a single `.safetensors` checkpoint, or "tiny", the embedded model.
      adapter: a native file, or a folder with `psa_adapter.safetensors`; None for the base model alone.
      table: embedding table, for users by id.
      dtype: one of DTYPES, of UNet and text encoders.
      variant, vae, tokenizer, model_config: further sources of the base model (`BaseModel`).
      lora: file or folder of a LoRA that is merged into the base model.
      lora_scale: its strength.

    Raises:
      PSAError: a path that is not there, files that cannot be used, or an adapter for another base model.
    """
    if dtype not in DTYPES:
        raise PSAError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    paths = {"vae": vae, "tokenizer": tokenizer, "model_config": model_config}
    source = BaseModel(
        str(model), variant, **{name: None if path is None else str(path) for name, path in paths.items()}
    )
    source.check()
    found = None if adapter is None else find_adapter(_path("adapter", adapter))
    if found is None and table is not None:
        raise PSAError("a table is for users of an adapter; give adapter=, or leave table out")
    known = None if table is None else EmbeddingTable.load(_path("table", table))
    loaded = source.load(dtype=jnp.dtype(dtype), lora=None if lora is None else Path(lora), lora_scale=lora_scale)
    if found is not None:
        loaded.require_base_of(found, read_metadata(found))
    return Pipeline(loaded, found, known)


MOST_GENERATORS = 8
"""Compiled samplers that a pipeline keeps; the oldest goes first."""


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | PathLike):
        raise PSAError(f"{name} is {type(value).__name__}; give a path as text")
    return Path(value)


def _prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise PSAError("prompt must be a text, or a list of at least one text")
    return prompts


def _scales(scale: Any) -> float | Float[np.ndarray, " n"]:
    """Strengths in float32; PSAError for other values than finite numbers."""
    try:
        scales = np.asarray(scale, np.float32)
    except (TypeError, ValueError) as error:
        raise PSAError("scale must be a number, or a list with one for each prompt") from error
    if not np.isfinite(scales).all():
        raise PSAError("scale must be finite numbers: 0 is the base model, 1 the whole adapter")
    return float(scales) if scales.ndim == 0 else scales.reshape(-1)


def _setting(name: str, value: Any, wanted: Any) -> Any:
    """A setting of `Generator` as the type that it has there.

    Raises:
      PSAError: another type, or a number that is not finite.
    """
    if name == "size":
        if value is None or (isinstance(value, list | tuple) and [type(side) for side in value] == [int, int]):
            return value and tuple(value)
        raise PSAError("size must be (height, width), two whole numbers of pixels")
    if wanted is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if wanted is not float and isinstance(value, wanted) and (wanted is not int or type(value) is int):
        return value
    what = {float: "a finite number", int: "a whole number", str: "a text"}.get(wanted, str(wanted))
    raise PSAError(f"{name} must be {what}")


class Pipeline:
    """A base model with or without an adapter; it compiles a sampler for each setting once.

    Args:
      model: the base model.
      adapter: native file of the adapter; None for the base model alone.
      table: embedding table, for users by id.

    Attributes:
      model: the base model.
      adapter: the adapter; None for the base model alone.
    """

    def __init__(self, model: StableDiffusion, adapter: Path | None = None, table: EmbeddingTable | None = None):
        self.model, self._file, self._table = model, adapter, table
        unet = model.unet.config
        self.adapter = None
        if adapter is not None:
            self.adapter = load_fitting_adapter(adapter, unet.cross_attentions, unet.cross_attention_dim)
            self._about = read_metadata(adapter)
        self._generators: dict[tuple, Generator] = {}

    def __repr__(self) -> str:
        height, width = self.model.picture_size
        kind = "no adapter" if self.adapter is None else repr(self.adapter)
        return f"Pipeline({self.model.family}, {width}x{height} px, {kind})"

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        profile: Any = None,  # checked below: a number in the place of an id is a common slip
        user: Any = None,
        seed: int | Sequence[int] = 0,
        scale: float | Sequence[float] = 1.0,
        negative: str | None = None,
        sld_concept: str | Sequence[str] | None = None,
        allow_unprotected: bool = False,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws a picture for each prompt.

        Args:
          prompt: one, or several.
          profile: of the user, a mapping or a `UserProfile`; one for all prompts, or a list with one for each.
          user: id of a user of the table, as text, in place of a profile; one for all prompts, or a list.
          seed: of the initial noise, 0 to 2^64 − 1. One seed gives all prompts the same noise.
          scale: strength of the adapter, 0 being the base model; one for all prompts, or one for each.
          negative: negative prompt.
          sld_concept: what the setting `sld` leads away from, in words; one for all prompts, or one for each.
          allow_unprotected: draws with the base model where there is no user.
          settings: of `Generator`: steps, guidance, rescale, sampler, eta, karras, unconditional, size, batch_size and
            sld.

        Returns:
          A picture for a prompt that is one text, else a list.

        Raises:
          PSAError: no user, a user without an adapter, lengths that differ, or an unknown setting.
        """
        prompts = _prompts(prompt)
        if not isinstance(negative, str | None):
            raise PSAError("negative must be a text")
        concepts = sld_concept if isinstance(sld_concept, str | None) else list(sld_concept)
        users = self._users(len(prompts), profile, user, allow_unprotected)
        seeds = list(seed) if isinstance(seed, list | tuple) else [seed] * len(prompts)
        if self.adapter is not None and users is None:  # the base model is the adapter at scale 0
            users, scale = np.zeros((len(prompts), self.adapter.config.user_dim), np.float32), 0.0
        # Numbers of prompts share programs: 5 to 8 are drawn by one.
        batch = min(32, 1 << (len(prompts) - 1).bit_length())
        generator = self._generator({"batch_size": batch} | settings)
        pictures = generator(prompts, seeds, users, negative=negative, scale=_scales(scale), concept=concepts)
        images = [Image.fromarray(pixels) for pixels in pictures]
        return images[0] if isinstance(prompt, str) else images

    def explain(
        self, prompt: str | Sequence[str], *, profile: Any = None, user: Any = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """What an adapter with the gate by categories replaces in a prompt: near 1 for what is asked for and banned.

        Args:
          prompt: one, or several.
          profile, user: as for `generate`.

        Returns:
          Category → value (p_k·b_k of `psa_jax.models.gates`), for a prompt that is one text; else a list.

        Raises:
          PSAError: no user, lengths that differ, or an adapter without a gate by categories.
        """
        if self.adapter is None:
            raise PSAError("the base model replaces nothing; load an adapter")
        require_gate(self._file, self.adapter.config)
        prompts = _prompts(prompt)
        users = self._users(len(prompts), profile, user, allow_unprotected=False)
        rows = prompt_gates(self.model, self.adapter, prompts, users)
        found = [dict(zip(CATEGORIES, map(float, row), strict=True)) for row in rows]
        return found[0] if isinstance(prompt, str) else found

    def _generator(self, settings: dict[str, Any]) -> Generator:
        parameters = inspect.signature(Generator).parameters.values()
        known = {each.name: each.annotation for each in parameters if each.kind == each.KEYWORD_ONLY}
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise PSAError(f"setting {unknown[0]!r} is unknown; use {', '.join(known)}")
        checked = {name: _setting(name, value, known[name]) for name, value in settings.items()}
        guidance, rescale = checked.pop("guidance", 7.5), checked.pop("rescale", 0.0)
        key = guidance > 1.0, *sorted(checked.items())
        if key not in self._generators:
            if len(self._generators) >= MOST_GENERATORS:
                self._generators.pop(next(iter(self._generators)))
            self._generators[key] = Generator(self.model, self.adapter, guidance=guidance, **checked)
        return self._generators[key].with_guidance(guidance, rescale)

    def _users(self, count: int, profile: Any, user: Any, allow_unprotected: bool) -> Float[np.ndarray, "n d"] | None:
        """Embeddings of the users of the prompts; None for the base model."""
        given = profile if profile is not None else user
        if self.adapter is None:
            if given is not None:
                raise PSAError("the base model draws alike for every user; load an adapter, or give no user")
            return None
        if given is None:
            if allow_unprotected:
                return None
            raise PSAError(
                "no user is given; give profile= or user=, or allow_unprotected=True for the base model's picture"
            )
        if profile is not None and user is not None:
            raise PSAError("both profile and user are given; give one of them")
        one = isinstance(given, str) or not isinstance(given, Sequence)
        each = [given] if one else list(given)
        if not one and len(each) != count:
            raise PSAError(f"{len(each)} users for {count} prompts; give one, or one for each")
        key = "user" if profile is None else "profile"
        rows = [self._embedding(**{key: member}) for member in each]
        return np.repeat(rows[0], count, axis=0) if one else np.concatenate(rows)

    def _embedding(self, profile: Any = None, user: Any = None) -> Float[np.ndarray, "1 d"]:
        if profile is None and not (isinstance(user, str) and user):
            raise PSAError(f"a user is {type(user).__name__}; give an id as text, such as '0000001', or a profile")
        if profile is None and self._table is None:
            raise PSAError("users by id need load(..., table=FILE)")
        if profile is not None and not isinstance(profile, UserProfile):
            profile = UserProfile.from_mapping(profile)
        return user_embedding(self._file, self._about, profile=profile, user=user, table=self._table)


def table_of(profiles: Sequence[Profile], encoder: str = "features") -> EmbeddingTable:
    """Encodes profiles with ids as an embedding table; `save` writes it.

    Args:
      profiles: each with a `user_id` of seven digits.
      encoder: name of the profile encoder.

    Raises:
      PSAError: a profile without an id, an id that is there twice, or an unknown encoder.
    """
    from psa_jax.profiles.encoders import get_encoder

    rows = [each if isinstance(each, UserProfile) else UserProfile.from_mapping(each) for each in profiles]
    return EmbeddingTable.from_profiles(rows, get_encoder(encoder))
