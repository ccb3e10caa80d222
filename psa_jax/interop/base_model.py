"""What the base model is: one record, said alike by the flags of a command and by the keys of a configuration."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import EMBEDDED, TINY, StableDiffusion, check_variant, load_stable_diffusion
from psa_jax.interop.parts import read_config
from psa_jax.interop.single_file import unet_config
from psa_jax.models.config import UNetConfig
from psa_jax.paths import local_path


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """Which files a base model is read from. The names of the attributes are those of flags and keys.

    Attributes:
      model: a folder in diffusers' layout, a single `.safetensors` checkpoint, or "tiny", the embedded one.
      variant: such as "fp16": which weight files of a folder; None for those without one.
      vae: another VAE, a folder or a single file.
      tokenizer, model_config: for a single file, which holds neither: folders with them.
    """

    model: str
    variant: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None

    @classmethod
    def from_config(cls, by: Mapping[str, Any] | ml_collections.ConfigDict) -> "BaseModel":
        """The record that flags (`vars(args)`) or a configuration give; what is empty or absent counts as None.

        Raises:
          PSAError: no model is named.
        """
        found = {field.name: str(by.get(field.name) or "") or None for field in dataclasses.fields(cls)}
        if found["model"] is None:
            raise PSAError(f"no base model is named; give --model=PATH, a base model's folder or file, or {EMBEDDED}")
        return cls(**found)

    @property
    def path(self) -> Path:
        """Of the folder or file."""
        return TINY if self.model == EMBEDDED else local_path(self.model)

    @property
    def extra_parts(self) -> dict[str, str]:
        """What is given besides the model."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "model" and value}

    def check(self) -> None:
        """Says what can be said before anything is read.

        Raises:
          PSAError: a path that is not there, or is no path here; the line names the flag.
        """
        for name in ("model", "vae", "tokenizer", "model_config"):
            text = getattr(self, name)
            if text and text != EMBEDDED and not local_path(text).exists():
                way_out = f"give a base model's folder or file, or {EMBEDDED}" if name == "model" else "check the path"
                raise PSAError(f"{name} is {text}, which is not there; {way_out}")

    def load(self, **how: Any) -> StableDiffusion:
        """The pipeline; `how` are further arguments of `load_stable_diffusion`."""
        tokenizer, config, vae = (text and local_path(text) for text in (self.tokenizer, self.model_config, self.vae))
        return load_stable_diffusion(
            self.path, variant=self.variant, vae=vae, tokenizer=tokenizer, config=config, **how
        )

    def unet_config(self) -> UNetConfig:
        """The UNet's configuration alone: no weight is read, and of a folder no other file.

        Raises:
          PSAError: what `load` would refuse of the record itself: a path that is not there, a variant that no part has.
        """
        self.check()
        check_variant(self.path, self.variant, () if self.vae is None else (local_path(self.vae),))
        if self.path.is_file():
            return unet_config(self.path, self.model_config and local_path(self.model_config))
        return read_config("unet", self.path / "unet" / "config.json")
