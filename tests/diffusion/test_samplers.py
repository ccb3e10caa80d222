"""DDIM against diffusers' scheduler, one step after the other, with the same model outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch_models import nhwc, tensor

from psa_jax.diffusion.samplers import ddim, leading_timesteps
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def both(steps: int, **change) -> tuple[DDIMScheduler, NoiseSchedule]:
    theirs = DDIMScheduler(**SD | change)
    theirs.set_timesteps(steps)
    return theirs, NoiseSchedule.from_config(dict(theirs.config))


@pytest.mark.parametrize(
    ("steps", "offset", "train"), [(1, 1, 1000), (3, 1, 1000), (20, 1, 1000), (50, 0, 1000), (600, 1, 1000), (7, 1, 30)]
)
def test_timesteps(steps, offset, train):
    theirs, schedule = both(steps, steps_offset=offset, num_train_timesteps=train)
    np.testing.assert_array_equal(leading_timesteps(schedule, steps, offset), theirs.timesteps.numpy())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_ddim_step_by_step(steps, prediction):
    theirs, schedule = both(steps, prediction_type=prediction)
    timesteps = leading_timesteps(schedule, steps)
    start, outputs = tensor(2, 4, 3, 5), tensor(steps, 2, 4, 3, 5, seed=1)

    expected, x = [], start
    for output, timestep in zip(outputs, theirs.timesteps, strict=True):
        expected.append(x)
        x = theirs.step(output, timestep, x).prev_sample

    seen, times = [], []

    def record(x, timestep):
        seen.append(np.asarray(x))
        times.append(int(timestep))
        return nhwc(outputs[len(seen) - 1])

    with jax.disable_jit():  # the scan becomes a loop, so that every x_t can be seen
        final = ddim(record, nhwc(start), schedule, timesteps)
    assert times == theirs.timesteps.tolist()
    for got, wanted in zip([*seen, final], [*expected, x], strict=True):
        np.testing.assert_allclose(got, nhwc(wanted), rtol=0, atol=1e-4)

    table = jnp.stack([nhwc(output) for output in outputs])
    jitted = jax.jit(
        lambda x: ddim(lambda _, t: table[jnp.argmax(jnp.asarray(timesteps) == t)], x, schedule, timesteps)
    )
    np.testing.assert_allclose(jitted(nhwc(start)), nhwc(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_model_that_knows_the_picture_finds_it(prediction):
    _, schedule = both(5, prediction_type=prediction)
    picture, noise = nhwc(tensor(1, 4, 3, 5)), nhwc(tensor(1, 4, 3, 5, seed=1))
    timesteps = leading_timesteps(schedule, 5)

    def know(x, t):
        at = t.reshape(1)
        signal = jnp.sqrt(schedule.alphas_cumprod[t])
        exact = (x - signal * picture) / jnp.sqrt(1.0 - schedule.alphas_cumprod[t])
        return schedule.target(picture, exact, at)

    start = schedule.add_noise(picture, noise, jnp.asarray(timesteps[:1]))
    end = ddim(know, start, schedule, timesteps)
    # What is left is the noise level of the step before the first, ᾱ_0.
    last = schedule.add_noise(picture, noise, jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(end, last, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [0, -3, 1000, torch.iinfo(torch.int32).max])
def test_impossible_step_counts(steps):
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(PSAError, match=f"between 1 and 999, got {steps}"):
        leading_timesteps(schedule, steps)
    assert len(leading_timesteps(schedule, 999)) == 999
