"""The package in a notebook: a base model with an adapter, drawn from in one line.

pipe = psa_jax.load("tiny", adapter="adapter.safetensors")
picture = pipe.generate("a cat in the snow", profile={"age": 9, "gender": "female"}, seed=1)
"""

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import find_adapter, fitting_config, read_metadata, read_tensors
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import load_adapter as load_fitting_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding

DTYPES = ("float32", "bfloat16", "float16")
Profile = Mapping[str, Any] | UserProfile
"""Such as `{"age": 9, "gender": "female"}`; see `UserProfile.from_mapping`."""


def load_adapter(path: str | PathLike[str]) -> Adapter:
    """Reads an adapter; its sizes come from the file.

    Args:
      path: a native file, or a folder with `psa_adapter.safetensors`.

    Raises:
      PSAError: no such file, a damaged one, or one of the torch original, which does not name its base model.
    """
    found = find_adapter(Path(path))
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
    found = None if adapter is None else find_adapter(Path(adapter))
    known = None if table is None else Path(table)
    if found is None and known is not None:
        raise PSAError("a table is for users of an adapter; give adapter=, or leave table out")
    loaded = source.load(dtype=jnp.dtype(dtype), lora=None if lora is None else Path(lora), lora_scale=lora_scale)
    if found is not None and not loaded.is_base_of(read_metadata(found)):
        raise PSAError(f"{found}: the adapter was trained for another base model than {loaded.folder}")
    return Pipeline(loaded, found, known)


class Pipeline:
    """A base model with or without an adapter; it compiles a sampler for each setting once.

    Args:
      model: the base model.
      adapter: native file of the adapter; None for the base model alone.
      table: file of an embedding table, for users by id.

    Attributes:
      model: the base model.
      adapter: the adapter; None for the base model alone.
    """

    def __init__(self, model: StableDiffusion, adapter: Path | None = None, table: Path | None = None):
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
          allow_unprotected: draws with the base model where there is no user.
          settings: of `Generator`: steps, guidance, rescale, sampler, eta, karras, unconditional, size, batch_size.

        Returns:
          A picture for a prompt that is one text, else a list.

        Raises:
          PSAError: no user, a user without an adapter, lengths that differ, or an unknown setting.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        users = self._users(len(prompts), profile, user, allow_unprotected)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if self.adapter is not None and users is None:  # the base model is the adapter at scale 0
            users, scale = np.zeros((len(prompts), self.adapter.config.user_dim), np.float32), 0.0
        scales = scale if isinstance(scale, float) else np.asarray(scale, np.float32)
        if not np.isfinite(scales).all():
            raise PSAError(f"scale is {scale}; give a number, 0 for the base model and 1 for the whole adapter")
        generator = self._generator({"batch_size": min(32, len(prompts))} | settings)
        pictures = generator(prompts, seeds, users, negative=negative, scale=scales)
        images = [Image.fromarray(pixels) for pixels in pictures]
        return images[0] if isinstance(prompt, str) else images

    def _generator(self, settings: dict[str, Any]) -> Generator:
        parameters = inspect.signature(Generator).parameters.values()
        known = {each.name: each.annotation for each in parameters if each.kind == each.KEYWORD_ONLY}
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise PSAError(f"setting {unknown[0]!r} is unknown; use {', '.join(known)}")
        whole = {name: float(value) for name, value in settings.items() if type(value) is int and known[name] is float}
        key = tuple(sorted((settings | whole).items()))
        if key not in self._generators:
            self._generators[key] = Generator(self.model, self.adapter, **settings | whole)
        return self._generators[key]

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
        if user is not None and not isinstance(user, str):
            raise PSAError(f"a user is {type(user).__name__}; give an id as text, such as '0000001', or a profile")
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
