"""Preference losses on numbers worked by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.preference import losses

# Two pairs: the policy betters the winner by .002 and worsens the loser by .001; then the other way round.
PW, RW = jnp.asarray([0.010, 0.014]), jnp.asarray([0.012, 0.012])
PL, RL = jnp.asarray([0.021, 0.019]), jnp.asarray([0.020, 0.020])


def test_margin():
    # (β/2)·(b − a): 500·(.001 + .002) = 1.5, and 500·(−.001 − .002) = −1.5.
    np.testing.assert_allclose(losses.margin(PW, PL, RW, RL, 1000.0), [1.5, -1.5], rtol=1e-5)
    np.testing.assert_allclose(losses.margin(PW, PL, RW, RL, 5000.0), [7.5, -7.5], rtol=1e-5)


def test_margin_does_not_care_for_what_both_models_find_hard():
    harder = losses.margin(PW + 0.5, PL, RW + 0.5, RL, 1000.0)
    np.testing.assert_allclose(harder, [1.5, -1.5], atol=1e-3)


def test_sigmoid():
    # −log σ(z) = log(1 + e^−z): log 2, log(1 + 1/3), log 4 at z = 0, log 3, −log 3.
    z = jnp.asarray([0.0, math.log(3.0), -math.log(3.0)])
    np.testing.assert_allclose(losses.sigmoid(z), [math.log(2.0), math.log(4.0 / 3.0), math.log(4.0)], rtol=1e-6)


def test_sigmoid_far_out_is_finite():
    np.testing.assert_allclose(losses.sigmoid(jnp.asarray([200.0, -200.0])), [0.0, 200.0], rtol=1e-6)
    gradient = jax.vmap(jax.grad(lambda z: losses.sigmoid(z[None])[0]))(jnp.asarray([0.0, 200.0, -200.0]))
    np.testing.assert_allclose(gradient, [-0.5, 0.0, -1.0], atol=1e-6)  # −σ(−z)


def test_sft_anchor():
    np.testing.assert_allclose(losses.sft_anchor(PW, RW), [-0.002, 0.002], rtol=1e-4)


@pytest.mark.parametrize(
    ("z", "expected"), [([1.0, 2.0], 1.0), ([-1.0, 2.0], 0.5), ([0.0, 0.0], 0.5), ([0.0, 3.0, -1e-9, 1e-9], 0.625)]
)
def test_accuracy_counts_ties_half(z, expected):
    assert float(losses.accuracy(jnp.asarray(z))) == expected
