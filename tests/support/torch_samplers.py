"""diffusers' schedulers driven as its pipelines do, and our samplers on the same model outputs and noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from psa_jax.diffusion.samplers import Sampler, model_input, start, step
from support.torch_models import FAST_COMPILE

SHAPE = (2, 3, 5, 4)  # schedulers work element by element, so torch may have it in our order
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_theirs(monkeypatch, scheduler, steps: int, noise, outputs, fresh, eta: float = 0.0):
    """(timesteps, first standard deviation, model inputs, latents after every call), driven as a pipeline does."""
    scheduler.set_timesteps(steps)
    high_order = scheduler.config.get("solver_order") == 3 or isinstance(scheduler, UniPCMultistepScheduler)
    if high_order and hasattr(scheduler, "sigmas"):
        # They divide by distances of λ: in float32 their rounding, 1e-7 of λ, is 1e-3 of the result at order 3 and 50
        # steps, and 2e-6 with UniPC.
        scheduler.sigmas = scheduler.sigmas.double()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it starts at the second of two equal timesteps
    count = len(scheduler.timesteps)
    calls = iter(fresh)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(calls))
    options = [{"eta": eta, "variance_noise": fresh[i]} if eta else {} for i in range(count)]
    latents, inputs, after = noise * scheduler.init_noise_sigma, [], []
    for timestep, output, option in zip(scheduler.timesteps, outputs, options, strict=False):
        inputs.append(scheduler.scale_model_input(latents, timestep))
        latents = scheduler.step(output, timestep, latents, **option, return_dict=False)[0]
        after.append(latents)
    deviation = float(scheduler.init_noise_sigma)
    return scheduler.timesteps.numpy(), deviation, torch.stack(inputs).numpy(), torch.stack(after).numpy()


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def run_ours(sampler: Sampler, noise, outputs, fresh):
    """(model inputs, latents after every call)."""

    def call(state, given):
        inputs, _ = model_input(sampler, state)
        state = step(sampler, state, given[0], given[1] if sampler.stochastic else None)
        return state, (inputs, state.latents)

    return jax.lax.scan(call, start(sampler, noise), (outputs, fresh))[1]


def assert_close(ours, theirs, largest: float) -> None:
    """Within 1e-4; where latents grow beyond hundreds (no signal at the start), within 2e-6 of the largest: float32."""
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 if largest < 200 else 2e-6 * largest)


def assert_same(monkeypatch, sampler: Sampler, scheduler, steps: int, eta: float = 0.0) -> None:
    noise, outputs, fresh = normal(*SHAPE, seed=0), normal(60, *SHAPE, seed=1), normal(60, *SHAPE, seed=2)
    timesteps, deviation, inputs, after = run_theirs(monkeypatch, scheduler, steps, noise, outputs, fresh, eta)
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=0, atol=1e-4)
    assert sampler.calls == len(timesteps)
    np.testing.assert_allclose(sampler.init_scale, deviation, rtol=1e-6)
    arrays = [jnp.asarray(array.numpy()) for array in (noise, outputs, fresh)]
    # Rows to spare, so that one compilation serves every number of steps.
    spare = len(outputs) - sampler.calls
    rows = jax.tree.map(lambda weights: np.pad(weights, [(0, spare)] + [(0, 0)] * (weights.ndim - 1)), sampler.rows)
    ours = run_ours(dataclasses.replace(sampler, rows=rows), *arrays)
    largest = max(deviation * noise.abs().max(), np.abs(after).max())
    for got, expected in zip(ours, (inputs, after), strict=True):
        assert_close(got[: sampler.calls], expected, largest)
