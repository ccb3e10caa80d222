"""Fingerprints of what cached data depends on: training refuses shards that were made with other weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from flax import nnx

from psa_jax.data.preprocess import Preprocess


def vae_fingerprint(vae: Mapping[str, Any], preprocess: Preprocess) -> str:
    """Fingerprint of cached moments: the VAE's weights, the resolution and the resampling.

    Names, types, shapes and values count; the order of the tensors and the metadata of their file do not.

    Args:
      vae: arrays by name, or `StableDiffusion.vae_tensors`, which are read one at a time.
      preprocess: how pictures were resized and cropped.

    Returns:
      64 hex digits.
    """
    digest = hashlib.sha256(json.dumps(asdict(preprocess), sort_keys=True).encode())
    for name in sorted(vae):
        array = np.asarray(vae[name])
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def text_fingerprint(text_encoders: Any) -> str:
    """Fingerprint of cached text embeddings: the values of all weights of the text encoders.

    Args:
      text_encoders: `StableDiffusion.text_encoders`, in the precision that `build` loads them in (float32).

    Returns:
      64 hex digits.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(text_encoders)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
