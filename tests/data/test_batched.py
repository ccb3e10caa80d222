"""Batches of one size: nothing is lost, nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.data import batched
from psa_jax.errors import PSAError


def test_encoding_pads_the_last_batch(encode):
    images = np.random.default_rng(0).uniform(-1, 1, (7, 4, 4, 3)).astype(np.float32)
    found = list(batched.encode_images(encode, iter(images), batch_size=3))
    assert encode.batches == [3, 3, 3]  # one shape: jit compiles once
    assert len(found) == 7
    expected = images.reshape(7, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(np.stack(found)[..., :3], expected, atol=1e-3)
    assert found[0].dtype == np.float16


def test_encoding_compiles_once():
    compilations = []

    @jax.jit
    def encode(pixels):
        compilations.append(pixels.shape)  # runs while tracing only
        return jnp.concatenate([pixels, pixels], axis=-1)

    images = [np.full((2, 2, 3), value, np.float32) for value in range(5)]
    found = list(batched.encode_images(encode, images, batch_size=2))
    assert compilations == [(2, 2, 2, 3)]
    np.testing.assert_array_equal([row[0, 0, 0] for row in found], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])  # 1e6 is infinite in float16
def test_moments_must_be_finite(value: float):
    def encode(pixels):
        return np.full((len(pixels), 2, 2, 2), value, np.float32)

    with pytest.raises(PSAError, match="picture 0"):
        list(batched.encode_images(encode, [np.zeros((4, 4, 3), np.float32)], batch_size=2))
