"""The table of prediction kinds: each entry against the formulas written out in float64, and against itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.diffusion.predictions import PREDICTIONS, prediction_of
from psa_jax.errors import PSAError
from psa_jax.preference import losses

ALPHA = np.array([0.999, 0.7, 0.25, 0.004])
SIGNAL, SIGMA = np.sqrt(ALPHA), np.sqrt(1 - ALPHA)
CLEAN, NOISE = np.random.default_rng(0).normal(size=(2, 4))
NOISY = SIGNAL * CLEAN + SIGMA * NOISE


@pytest.mark.parametrize(
    "name, expected",
    [("epsilon", NOISE), ("v_prediction", SIGNAL * NOISE - SIGMA * CLEAN), ("sample", CLEAN)],
)
def test_target(name, expected):
    np.testing.assert_array_equal(PREDICTIONS[name].target(CLEAN, NOISE, SIGNAL, SIGMA), expected)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_clean_and_noise_are_found_from_the_latents_and_the_target(name):
    prediction = PREDICTIONS[name]
    output = prediction.target(CLEAN, NOISE, SIGNAL, SIGMA)
    for weights, expected in ((prediction.clean, CLEAN), (prediction.noise, NOISE)):
        of_latents, of_output = weights(SIGNAL, SIGMA)
        np.testing.assert_allclose(of_latents * NOISY + of_output * output, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "name, expected", [("epsilon", -SIGMA / SIGNAL), ("v_prediction", -SIGMA), ("sample", np.ones(4))]
)
def test_clean_slope(name, expected):
    slope = PREDICTIONS[name].clean_slope(jnp.asarray(ALPHA, jnp.float32))
    assert slope.shape == (4,) and slope.dtype == jnp.float32
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    assert np.isfinite(PREDICTIONS[name].clean_slope(jnp.asarray([0.0]))).all()


@pytest.mark.parametrize("name", PREDICTIONS)
def test_an_error_of_the_output_is_this_many_errors_of_the_noise(name):
    prediction, snr = PREDICTIONS[name], ALPHA / (1 - ALPHA)
    error = 1e-3 * np.arange(1, 5)
    _, to_clean = prediction.clean(SIGNAL, SIGMA)
    # x stays: signal·x̂ + sigma·ε̂ is constant, so an error of x̂ is one of −sigma/signal times as much in ε̂.
    noise_error = (SIGNAL / SIGMA * to_clean * error) ** 2
    np.testing.assert_allclose(prediction.noise_error(snr) * error**2, noise_error, rtol=1e-6)


def test_only_epsilon_leaves_the_clean_latents_undefined_without_signal():
    for name, prediction in PREDICTIONS.items():
        with np.errstate(divide="ignore"):
            finite = np.isfinite(prediction.clean(np.float64(0), np.float64(1))).all()
        assert prediction.needs_signal == (not finite) == (name == "epsilon")


@pytest.mark.parametrize("name", ["flow_prediction", None, ["epsilon"]])
def test_an_unknown_kind_is_refused_with_the_known_ones(name):
    with pytest.raises(PSAError, match=r"^x\.json: prediction_type .* \(only epsilon, v_prediction, sample\)$"):
        prediction_of(name, "x.json")


def test_weights_of_the_loss_refuse_an_unknown_kind():
    with pytest.raises(PSAError, match="only epsilon, v_prediction, sample"):
        losses.timestep_weight("snr", jnp.ones(2), "flow_prediction", 5.0)
