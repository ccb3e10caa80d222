"""Samplers against diffusers' schedulers, call by call, on the same model outputs and the same noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from support.torch_samplers import BETAS, SHAPE, assert_same, normal

from psa_jax.diffusion.sampler_registry import SAMPLERS
from psa_jax.diffusion.samplers import guide, sample, start, step, step_noise
from psa_jax.diffusion.scheduler_config import sampler_from_config
from psa_jax.errors import PSAError

# diffusers turns tensors into arrays in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 3, 10, 20, 25, 50)

LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
LINSPACE, TRAILING = {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True} | V
LINEAR = {"beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KARRAS = {"use_karras_sigmas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
TURBO = BETAS | LEADING | TRAILING
UNCLIPPED = {"clip_sample": False}
PLMS = {"skip_prk_steps": True}

# Sampler, what is put on top of the betas, and DDIM's eta.
CASES: dict[str, tuple[str, dict, float]] = {
    "ddim": ("ddim", LEADING | UNCLIPPED | {"set_alpha_to_one": False}, 0.0),
    "ddim-defaults": ("ddim", {}, 0.0),
    "ddim-linear": ("ddim", LINEAR | UNCLIPPED, 0.0),
    "ddim-cosine": ("ddim", COSINE | UNCLIPPED, 0.0),
    "ddim-cosine-v-trailing": ("ddim", COSINE | V | TRAILING | UNCLIPPED, 0.0),
    "ddim-linspace": ("ddim", LINSPACE | UNCLIPPED, 0.0),
    "ddim-trailing": ("ddim", TRAILING | UNCLIPPED, 0.0),
    "ddim-v": ("ddim", LEADING | V | UNCLIPPED | {"set_alpha_to_one": False}, 0.0),
    "ddim-sample": ("ddim", LEADING | X0 | UNCLIPPED, 0.0),
    "ddim-clip-range": ("ddim", LEADING | V | {"clip_sample_range": 1.5}, 0.0),
    "ddim-zero-snr": ("ddim", ZERO_SNR | TRAILING | UNCLIPPED, 0.0),
    "ddim-zero-snr-leading": ("ddim", ZERO_SNR | LEADING | UNCLIPPED | {"prediction_type": "epsilon"}, 0.0),
    "ddim-eta": ("ddim", LEADING | UNCLIPPED | {"set_alpha_to_one": False}, 0.4),
    "ddim-eta-1": ("ddim", TRAILING | V | UNCLIPPED, 1.0),
    "ddim-eta-clip": ("ddim", LINSPACE | V, 1.0),
    "ddim-eta-zero-snr": ("ddim", ZERO_SNR | TRAILING | UNCLIPPED, 0.7),
    "euler": ("euler", {}, 0.0),
    "euler-leading": ("euler", LEADING, 0.0),
    "euler-trailing": ("euler", TRAILING, 0.0),
    "euler-linear": ("euler", LINEAR, 0.0),
    "euler-cosine": ("euler", COSINE, 0.0),
    "euler-v": ("euler", LEADING | V, 0.0),
    "euler-sample": ("euler", TRAILING | X0, 0.0),
    "euler-karras": ("euler", KARRAS, 0.0),
    "euler-karras-leading-v": ("euler", KARRAS | LEADING | V, 0.0),
    "euler-sigma-min": ("euler", SIGMA_MIN | LEADING, 0.0),
    "euler-karras-sigma-min": ("euler", KARRAS | SIGMA_MIN, 0.0),
    "euler-zero-snr": ("euler", ZERO_SNR | TRAILING, 0.0),
    "ancestral": ("euler-ancestral", {}, 0.0),
    "ancestral-leading": ("euler-ancestral", LEADING, 0.0),
    "ancestral-trailing": ("euler-ancestral", TRAILING, 0.0),
    "ancestral-v": ("euler-ancestral", LEADING | V, 0.0),
    "ancestral-linear": ("euler-ancestral", LINEAR | TRAILING, 0.0),
    "ancestral-zero-snr": ("euler-ancestral", ZERO_SNR | TRAILING, 0.0),
    "dpm": ("dpmsolver++", {}, 0.0),
    "dpm-leading": ("dpmsolver++", LEADING, 0.0),
    "dpm-trailing": ("dpmsolver++", TRAILING, 0.0),
    "dpm-order-1": ("dpmsolver++", {"solver_order": 1}, 0.0),
    "dpm-order-3": ("dpmsolver++", {"solver_order": 3}, 0.0),
    "dpm-order-3-sigma-min": ("dpmsolver++", SIGMA_MIN | {"solver_order": 3, "euler_at_final": True}, 0.0),
    "dpm-order-3-karras-v": ("dpmsolver++", KARRAS | V | {"solver_order": 3, "lower_order_final": False}, 0.0),
    "dpm-heun": ("dpmsolver++", {"solver_type": "heun"}, 0.0),
    "dpm-heun-sigma-min": ("dpmsolver++", SIGMA_MIN | {"solver_type": "heun"}, 0.0),
    "dpm-high-order-final": ("dpmsolver++", SIGMA_MIN | {"lower_order_final": False}, 0.0),
    "dpm-euler-at-final": ("dpmsolver++", SIGMA_MIN | {"euler_at_final": True}, 0.0),
    "dpm-sigma-min": ("dpmsolver++", SIGMA_MIN | LEADING, 0.0),
    "dpm-karras": ("dpmsolver++", KARRAS, 0.0),
    "dpm-karras-heun-leading": ("dpmsolver++", KARRAS | LEADING | {"solver_type": "heun"}, 0.0),
    "dpm-karras-sigma-min": ("dpmsolver++", KARRAS | SIGMA_MIN, 0.0),
    "dpm-v": ("dpmsolver++", LEADING | V, 0.0),
    "dpm-karras-v": ("dpmsolver++", KARRAS | V, 0.0),
    "dpm-sample": ("dpmsolver++", X0, 0.0),
    "dpm-linear": ("dpmsolver++", LINEAR, 0.0),
    "dpm-cosine": ("dpmsolver++", COSINE | V | {"lambda_min_clipped": -5.1}, 0.0),
    "dpm-cosine-trailing": ("dpmsolver++", COSINE | V | TRAILING | {"lambda_min_clipped": -5.1}, 0.0),
    "dpm-cosine-karras": ("dpmsolver++", COSINE | KARRAS | V, 0.0),
    "dpm-zero-snr": ("dpmsolver++", ZERO_SNR | TRAILING, 0.0),
    "unipc": ("unipc", {}, 0.0),
    "unipc-leading": ("unipc", LEADING, 0.0),
    "unipc-trailing": ("unipc", TRAILING, 0.0),
    "unipc-order-1": ("unipc", {"solver_order": 1}, 0.0),
    "unipc-order-3": ("unipc", {"solver_order": 3}, 0.0),
    "unipc-bh1": ("unipc", SIGMA_MIN | {"solver_type": "bh1"}, 0.0),
    "unipc-bh1-order-3": ("unipc", SIGMA_MIN | {"solver_type": "bh1", "solver_order": 3}, 0.0),
    "unipc-noise": ("unipc", SIGMA_MIN | {"predict_x0": False}, 0.0),
    "unipc-noise-bh1-order-3-v": (
        "unipc",
        SIGMA_MIN | V | {"predict_x0": False, "solver_type": "bh1", "solver_order": 3},
        0.0,
    ),
    "unipc-high-order-final": ("unipc", SIGMA_MIN | {"lower_order_final": False}, 0.0),
    "unipc-high-order-final-3": ("unipc", SIGMA_MIN | V | {"lower_order_final": False, "solver_order": 3}, 0.0),
    "unipc-uncorrected": ("unipc", {"disable_corrector": [0, 3]}, 0.0),
    "unipc-uncorrected-3": ("unipc", {"disable_corrector": [1, 2, 9], "solver_order": 3}, 0.0),
    "unipc-karras": ("unipc", KARRAS, 0.0),
    "unipc-karras-sigma-min": ("unipc", KARRAS | SIGMA_MIN, 0.0),
    "unipc-karras-high-order-final": ("unipc", KARRAS | SIGMA_MIN | {"lower_order_final": False}, 0.0),
    "unipc-v": ("unipc", LEADING | V, 0.0),
    "unipc-sample": ("unipc", X0, 0.0),
    "unipc-zero-snr": ("unipc", ZERO_SNR | TRAILING, 0.0),
    "unipc-linear": ("unipc", LINEAR, 0.0),
    "unipc-cosine-karras-v": ("unipc", COSINE | KARRAS | V, 0.0),
    "unipc-other-solver": ("unipc", {"solver_type": "midpoint"}, 0.0),
    "pndm": ("pndm", PLMS | LEADING, 0.0),
    "pndm-no-offset": ("pndm", PLMS, 0.0),
    "pndm-alpha-one": ("pndm", PLMS | LEADING | {"set_alpha_to_one": True}, 0.0),
    "pndm-linspace": ("pndm", PLMS | LINSPACE, 0.0),
    "pndm-trailing": ("pndm", PLMS | TRAILING, 0.0),
    "pndm-v": ("pndm", PLMS | LEADING | V, 0.0),
    "pndm-v-linspace": ("pndm", PLMS | LINSPACE | V, 0.0),
    "pndm-linear": ("pndm", PLMS | LINEAR, 0.0),
    "pndm-runge-kutta": ("pndm", LEADING, 0.0),
    "pndm-runge-kutta-v-linspace": ("pndm", LINSPACE | V | {"set_alpha_to_one": True}, 0.0),
    "pndm-runge-kutta-trailing": ("pndm", TRAILING, 0.0),
}
LEAST = {"pndm-runge-kutta": 4, "pndm-runge-kutta-v-linspace": 4, "pndm-runge-kutta-trailing": 4}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_call_by_call(monkeypatch, case, steps):
    name, change, eta = CASES[case]
    if steps < LEAST.get(case, 1):
        steps = LEAST[case] + steps
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler)(**BETAS | change)
    sampler = sampler_from_config(BETAS | change | {"_class_name": SAMPLERS[name].scheduler}, steps, eta=eta)
    assert_same(monkeypatch, sampler, scheduler, steps, eta)


@pytest.mark.parametrize("case", ["euler", "euler-karras", "euler-zero-snr", "ancestral-leading"])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_sigmas(case, steps):
    name, change, _ = CASES[case]
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler)(**BETAS | change)
    scheduler.set_timesteps(steps)
    scale = sampler_from_config(BETAS | change, steps, name).rows.input_scale.astype(float)
    np.testing.assert_allclose(np.sqrt(1 / scale**2 - 1), scheduler.sigmas[:-1].numpy(), rtol=2e-5)


def test_one_step_of_a_turbo_model_is_its_clean_prediction():
    sampler = sampler_from_config(TURBO, 1, "euler-ancestral")
    assert sampler.timesteps.tolist() == [999.0]
    assert not sampler.stochastic
    noise = jnp.asarray(normal(*SHAPE, seed=0).numpy())
    sigma = float(sampler.init_scale)
    assert sigma == pytest.approx(14.6146, abs=1e-4)
    drawn = sample(sampler, lambda x, t, m: (jnp.tanh(x) + t / 999, m), noise)
    inputs = sigma * np.asarray(noise) / np.sqrt(sigma**2 + 1)
    np.testing.assert_allclose(drawn, sigma * np.asarray(noise) - sigma * (np.tanh(inputs) + 1), atol=2e-5)


LOOPS = ["ddim-v", "euler-karras-leading-v", "ancestral-v", "dpm-karras-v", "unipc-v", "pndm-v"]


@pytest.mark.parametrize("case", LOOPS)
def test_the_loop_with_a_model(monkeypatch, case):
    """The model sees scaled latents and timesteps; noise comes from each picture's own key."""
    name, change, _ = CASES[case]
    sampler = sampler_from_config(BETAS | change, 4, name)
    noise, keys = normal(*SHAPE, seed=0), jnp.stack([jax.random.key(seed) for seed in (5, 6)])
    fresh = [step_noise(keys, jnp.int32(k), SHAPE[1:]) for k in range(sampler.calls)]
    calls = iter(torch.from_numpy(np.array(array)) for array in fresh)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(calls))

    scheduler = getattr(diffusers, SAMPLERS[name].scheduler)(**BETAS | change)
    scheduler.set_timesteps(4)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.tanh(2 * scheduler.scale_model_input(latents, t)) + t / 1000
        latents = scheduler.step(output, t, latents, return_dict=False)[0]

    drawn = sample(sampler, lambda x, t, m: (jnp.tanh(2 * x) + t / 1000, m), jnp.asarray(noise.numpy()), keys)
    np.testing.assert_allclose(drawn, latents.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "eta"), [("euler-ancestral", 0.0), ("ddim", 0.8)])
def test_a_picture_does_not_depend_on_its_batch(name, eta):
    sampler = sampler_from_config(BETAS | LEADING, 3, name, eta=eta)
    assert sampler.stochastic
    keys = jnp.stack([jax.random.key(seed) for seed in (5, 6, 5)])
    noise = jnp.stack([jax.random.normal(key, SHAPE[1:]) for key in keys])
    draw = jax.jit(lambda noise, keys: sample(sampler, lambda x, t, m: (jnp.tanh(x), m), noise, keys))
    together = np.asarray(draw(noise, keys))
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_allclose(draw(noise[1:2], keys[1:2])[0], together[1], rtol=0, atol=1e-6)


def test_noise_differs_between_steps_pictures_and_the_start():
    keys = jnp.stack([jax.random.key(seed) for seed in (5, 6)])
    shape = (64, 64, 4)
    first, second = step_noise(keys, jnp.int32(0), shape), step_noise(keys, jnp.int32(1), shape)
    at_start = jax.random.normal(keys[0], shape)
    drawn = np.stack([np.ravel(array) for array in (*first, *second, at_start)])
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 0.05
    assert np.abs(drawn.std(1) - 1).max() < 0.03


def test_a_stochastic_sampler_needs_keys_and_noise():
    sampler = sampler_from_config(TURBO, 2, "euler-ancestral")
    noise = jnp.zeros(SHAPE)
    with pytest.raises(PSAError, match="one key a picture"):
        sample(sampler, lambda x, t, m: (x, m), noise)
    with pytest.raises(PSAError, match="give noise"):
        step(sampler, start(sampler, noise), noise)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance(rescale):
    without, with_prompt = normal(*SHAPE, seed=0), 2 * normal(*SHAPE, seed=1)
    expected = without + 5.0 * (with_prompt - without)
    if rescale:
        expected = rescale_noise_cfg(expected, with_prompt, rescale)
    arrays = jnp.asarray(without.numpy()), jnp.asarray(with_prompt.numpy())
    np.testing.assert_allclose(guide(*arrays, 5.0, rescale), expected.numpy(), rtol=0, atol=1e-5)
    traced = jax.jit(guide)(*arrays, jnp.float32(5.0), jnp.float32(rescale))
    np.testing.assert_allclose(traced, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [0, -3, 1000, torch.iinfo(torch.int32).max])
@pytest.mark.parametrize(
    ("name", "most"), [("ddim", 999), ("euler-ancestral", 999), ("pndm", 999), ("dpmsolver++", 998)]
)
def test_impossible_step_counts(name, most, steps):
    config = BETAS | LEADING | PLMS
    with pytest.raises(PSAError, match=f"sampling steps must be between 1 and {most}, got {steps}"):
        sampler_from_config(config, steps, name)
    assert sampler_from_config(config, most, name).timesteps.max() == 999


def test_timesteps_stay_below_the_trained_ones():
    # 500 steps are 2 apart: the offset pushes the first one to 1000.
    with pytest.raises(PSAError, match="500 sampling steps with steps_offset 2 pass the last of 1000 timesteps"):
        sampler_from_config(BETAS | {"steps_offset": 2}, 500, "ddim")
    # 1000/61 · 61 is a little more than 1000 in floating point, and diffusers goes on to timestep -1.
    times = sampler_from_config(BETAS | TRAILING, 61, "ddim").timesteps
    assert (len(times), times[0], times[-1]) == (61, 999, 15)
