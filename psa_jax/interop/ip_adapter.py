"""The `published` kind as an IP-Adapter, which stock diffusers loads: `pipe.load_ip_adapter`."""

from pathlib import Path

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import Tensors
from psa_jax.interop.upstream import as_published
from psa_jax.models.adapter_config import AdapterConfig

TOKENS = 4  # what diffusers takes for granted
WEIGHT_NAME = "ip_adapter.safetensors"


def to_ip_adapter(tensors: Tensors, config: AdapterConfig, where: Path) -> Tensors:
    """Tensors under the names of an IP-Adapter.

    T = 1 and 2 are repeated to four tokens, which is exact: attention over equal tokens does not see how many they are.

    Args:
      tensors: of the native file.
      where: that file, for errors.

    Raises:
      PSAError: diffusers cannot do what this adapter does.
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
            # diffusers counts self-attentions too
            name = f"ip_adapter.{2 * index + 1}.{which}_ip.weight"
            renamed[name] = published[f"psa_adapter.{index}.{which}_user.0.weight"]
    return renamed
