"""The forward process against diffusers' schedulers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from support.torch_models import nhwc, tensor

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CONFIGS = {
    "sd": SD,
    "defaults": {},
    "short": {"num_train_timesteps": 50, "beta_end": 0.3},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": SD | {"rescale_betas_zero_snr": True},
    "cosine_zero_snr": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
}


EPS = 2.0**-24  # one rounding to float32, relative


def mixed(first, second, alphas, rank=4):
    """√ᾱ·first + √(1 − ᾱ)·second in float64."""
    alphas = np.asarray(alphas, np.float64).reshape(-1, *(1,) * (rank - 1))
    return np.sqrt(alphas) * np.asarray(first, np.float64) + np.sqrt(1 - alphas) * np.asarray(second, np.float64)


def mixing_bound(first, second, ours, theirs, rank=4):
    """How far two float32 evaluations of `mixed` may be apart, of ᾱ that are themselves a rounding or two apart.

    |√a − √b| and |√(1 − a) − √(1 − b)| are exact here; the second is |a − b|/(√(1 − a) + √(1 − b)), which makes much of
    one rounding of ᾱ where 1 − ᾱ is small. The rest: roots, products and the sum round at most four times on each side.
    """
    a, b = (np.asarray(x, np.float64).reshape(-1, *(1,) * (rank - 1)) for x in (ours, theirs))
    first, second = np.abs(np.asarray(first, np.float64)), np.abs(np.asarray(second, np.float64))
    moved = first * np.abs(np.sqrt(a) - np.sqrt(b)) + second * np.abs(np.sqrt(1 - a) - np.sqrt(1 - b))
    return moved + 8 * EPS * (first * np.sqrt(a) + second * np.sqrt(1 - a))


@pytest.mark.parametrize("roundings", [0, 1, -1], ids=["as computed", "one rounding up", "one rounding down"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scheduler_type", [DDPMScheduler, DDIMScheduler])
def test_schedule(scheduler_type, config, roundings):
    """Against diffusers, also where our ᾱ are rounded otherwise, as another processor's exp, cos and sqrt may do."""
    theirs = scheduler_type(**config, prediction_type="v_prediction")
    ours = NoiseSchedule.from_config(dict(theirs.config))
    assert ours.steps == theirs.config.num_train_timesteps
    alphas = np.asarray(ours.alphas_cumprod)
    if roundings:
        alphas = np.clip(np.nextafter(alphas, np.float32(2 * roundings)), 0, np.float32(1 - 2 * EPS))
        ours = dataclasses.replace(ours, alphas_cumprod=jnp.asarray(alphas))
    # ᾱ ≤ 1 is a product of factors that both sides round alike but for the last place of a few.
    np.testing.assert_allclose(alphas, theirs.alphas_cumprod.numpy(), rtol=0, atol=16 * EPS)

    steps = torch.tensor([0, 1, ours.steps // 2, ours.steps - 1])
    latents, noise = tensor(4, 4, 3, 5), tensor(4, 4, 3, 5, seed=1)
    x, e = nhwc(latents), nhwc(noise)
    arguments = x, e, jnp.asarray(steps.numpy(), dtype=jnp.int32)
    a, b = alphas[steps.numpy()], theirs.alphas_cumprod[steps].numpy()
    for got, wanted, first, second in (
        (ours.add_noise(*arguments), theirs.add_noise(latents, noise, steps), x, e),
        (ours.target(*arguments), theirs.get_velocity(latents, noise, steps), e, -x),
    ):
        got = np.asarray(got, np.float64)
        assert (np.abs(got - mixed(first, second, a)) <= mixing_bound(first, second, a, a)).all()
        assert (np.abs(got - np.asarray(nhwc(wanted), np.float64)) <= mixing_bound(first, second, a, b)).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_relative_precision_near_the_end(config):
    # Where little signal is left, samplers divide by it. Rescaling subtracts near neighbours in float32.
    theirs = DDIMScheduler(**config).alphas_cumprod.numpy()
    rtol = 5e-5 if config.get("rescale_betas_zero_snr") else 5e-6
    np.testing.assert_allclose(NoiseSchedule.from_config(config).alphas_cumprod, theirs, rtol=rtol, atol=1e-12)


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before():
    plain = NoiseSchedule.from_config(SD).alphas_cumprod
    rescaled = NoiseSchedule.from_config(SD | {"rescale_betas_zero_snr": True}).alphas_cumprod
    assert rescaled[-1] == 0
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-6)
    assert (np.diff(rescaled) < 0).all()


def test_targets_of_predictors_of_the_noise_and_of_the_picture():
    latents, noise = nhwc(tensor(2, 4, 3, 5)), nhwc(tensor(2, 4, 3, 5, seed=1))
    steps = jnp.asarray([3, 999], dtype=jnp.int32)
    np.testing.assert_array_equal(NoiseSchedule.from_config(SD).target(latents, noise, steps), noise)
    picture = NoiseSchedule.from_config(SD | {"prediction_type": "sample"})
    np.testing.assert_array_equal(picture.target(latents, noise, steps), latents)


def test_signal_to_noise_falls_and_matches_its_definition():
    schedule = NoiseSchedule.from_config(SD)
    alphas = DDPMScheduler(**SD).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.signal_to_noise(), alphas / (1 - alphas), rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow_prediction"},
        {"trained_betas": [0.1, 0.2]},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": "1000"},
        {"beta_start": 0.0},
        {"beta_end": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_implemented_is_refused_by_name(change):
    with pytest.raises(PSAError) as caught:
        NoiseSchedule.from_config(SD | change, "x/scheduler_config.json")
    text = str(caught.value)
    assert text.startswith("x/scheduler_config.json: ")
    assert next(iter(change)) in text
    assert "\n" not in text
