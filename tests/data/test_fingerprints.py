"""Fingerprints depend on what the cached numbers depend on, and on nothing else."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from psa_jax.data.fingerprints import text_fingerprint, vae_fingerprint
from psa_jax.data.preprocess import Preprocess
from psa_jax.interop.weights import open_tensors


def test_fingerprint_of_file_and_arrays(tmp_path: Path):
    weights = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones(2, np.float16),
        "c": np.ones(2, ml_dtypes.bfloat16),
    }
    preprocess = Preprocess(8)
    base = vae_fingerprint(weights, preprocess)
    save_file(weights, tmp_path / "vae.safetensors", metadata={"made": "today"})
    assert vae_fingerprint(open_tensors(tmp_path / "vae.safetensors").by_name, preprocess) == base
    assert len(base) == 64 and int(base, 16)
    others = [
        vae_fingerprint(weights | {"a": np.zeros(2, np.float16)}, preprocess),
        vae_fingerprint(weights | {"b": weights["b"].reshape(3, 2)}, preprocess),
        vae_fingerprint(weights, Preprocess(16)),
        vae_fingerprint(weights, Preprocess(8, resample="lanczos")),
    ]
    assert len({base, *others}) == 5


def test_fingerprint_of_text_encoders():
    """Of the values of all weights, in order."""
    one, two = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    values = [np.asarray(array) for m in (one, two) for array in (m.bias[...], m.kernel[...])]
    found = text_fingerprint((one, two))
    assert found == hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
    assert found not in (text_fingerprint((one,)), text_fingerprint((two, one)))
