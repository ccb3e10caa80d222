"""Export of `published` adapters as IP-Adapters, which stock diffusers loads with `pipe.load_ip_adapter`."""

from pathlib import Path

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import Tensors
from psa_jax.interop.upstream import as_published
from psa_jax.models.adapter_config import AdapterConfig

TOKENS = 4
"""Number of tokens of every IP-Adapter in diffusers."""
WEIGHT_NAME = "ip_adapter.safetensors"


def to_ip_adapter(tensors: Tensors, config: AdapterConfig, where: Path) -> Tensors:
    """Tensors of an adapter under the names of an IP-Adapter.

    One or two tokens are repeated to four. This is exact: attention over equal tokens does not depend on their number.

    Args:
      tensors: of the native file.
      config: the adapter's sizes.
      where: the file, for errors.

    Raises:
      PSAError: an adapter that is not equal to a `published` one of 1, 2 or 4 tokens.
    """
    published = as_published(tensors, config, where, "ip-adapter")
    if TOKENS % config.tokens:
        raise PSAError(
            f"{where}: the ip-adapter format has {TOKENS} tokens and takes adapters of 1, 2 or {TOKENS}, this one has "
            f"{config.tokens}; export it with --format=native and load it with psa_jax.torch (load_psa)"
        )
    repeats = TOKENS // config.tokens
    renamed = {
        "image_proj.proj.weight": np.tile(published["user_proj.proj.weight"], (repeats, 1)),
        "image_proj.proj.bias": np.tile(published["user_proj.proj.bias"], repeats),
        "image_proj.norm.weight": published["user_proj.norm.weight"],
        "image_proj.norm.bias": published["user_proj.norm.bias"],
    }
    for index in range(len(config.layers)):
        for which in ("to_k", "to_v"):
            # diffusers' numbers include the self-attentions.
            name = f"ip_adapter.{2 * index + 1}.{which}_ip.weight"
            renamed[name] = published[f"psa_adapter.{index}.{which}_user.0.weight"]
    return renamed
