"""Choice of a base model: one record for the flags of commands and the keys of configurations."""

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
    """Sources of a base model. Attributes have the names of flags and configuration keys.

    Attributes:
      model: a folder in diffusers' layout, a single `.safetensors` checkpoint, or "tiny", the embedded one.
      variant: of a folder's weight files, such as "fp16"; None for files without one.
      vae: another VAE, a folder or a single file.
      tokenizer, model_config: folders for a single file, which holds neither.
    """

    model: str
    variant: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None

    @classmethod
    def from_config(cls, by: Mapping[str, Any] | ml_collections.ConfigDict) -> "BaseModel":
        """Record of a command's flags or a configuration's keys.

        Args:
          by: `vars(args)`, or the configuration. Empty and absent values count as None.

        Raises:
          PSAError: no model is named.
        """
        found = {field.name: str(by.get(field.name) or "") or None for field in dataclasses.fields(cls)}
        if found["model"] is None:
            raise PSAError(f"no base model is named; give --model=PATH, a base model's folder or file, or {EMBEDDED}")
        return cls(**found)

    @property
    def path(self) -> Path:
        """Path of the folder or file."""
        return TINY if self.model == EMBEDDED else local_path(self.model)

    @property
    def extra_parts(self) -> dict[str, str]:
        """Given attributes other than `model`, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "model" and value}

    def check(self) -> None:
        """Checks that all paths exist, without reading files.

        Raises:
          PSAError: a path that does not exist, or a remote one; the message names the flag.
        """
        for name in ("model", "vae", "tokenizer", "model_config"):
            text = getattr(self, name)
            if text and text != EMBEDDED and not local_path(text).exists():
                way_out = f"give a base model's folder or file, or {EMBEDDED}" if name == "model" else "check the path"
                raise PSAError(f"{name} is {text}, which is not there; {way_out}")

    def load(self, **how: Any) -> StableDiffusion:
        """The pipeline of these sources.

        Args:
          how: further arguments of `load_stable_diffusion`.

        Raises:
          PSAError: as `load_stable_diffusion`.
        """
        tokenizer, config, vae = (text and local_path(text) for text in (self.tokenizer, self.model_config, self.vae))
        return load_stable_diffusion(
            self.path, variant=self.variant, vae=vae, tokenizer=tokenizer, config=config, **how
        )

    def unet_config(self) -> UNetConfig:
        """UNet configuration, without reading weights or other files of a folder.

        Raises:
          PSAError: a path that does not exist, a variant that no part has, or an unsupported configuration.
        """
        self.check()
        check_variant(self.path, self.variant, () if self.vae is None else (local_path(self.vae),))
        if self.path.is_file():
            return unet_config(self.path, self.model_config and local_path(self.model_config))
        return read_config("unet", self.path / "unet" / "config.json")
