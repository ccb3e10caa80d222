"""All encoders by name, and what each needs. Imports nothing heavy: the command line lists the names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class EncoderEntry:
    """How an encoder is made.

    Args:
      maker: the function or class, as "module:name".
      options: its keyword arguments, the same for all users of the name.
      model: what `--model` must name; None for an encoder that needs no model.
    """

    maker: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


ENCODERS: Mapping[str, EncoderEntry] = MappingProxyType(
    {
        "features": EncoderEntry("psa_jax.profiles.encoders:FeatureEncoder"),
        "features-no-bans": EncoderEntry("psa_jax.profiles.encoders:FeatureEncoder", {"ban_bits": False}),
        "qwen": EncoderEntry(
            "psa_jax.profiles.qwen_encoder:load_qwen_encoder", model="a Qwen2.5 folder in transformers' layout"
        ),
    }
)
"""Name → how the encoder is made."""
