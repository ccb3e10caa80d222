"""Samplers as pure functions over an explicit plan of timesteps; the loop is one `lax.scan`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError


def leading_timesteps(schedule: NoiseSchedule, steps: int, offset: int = 1) -> Int[np.ndarray, " n"]:
    """Timesteps from noisy to clean at equal distances, shifted by `offset` (diffusers' `leading` spacing)."""
    if not 1 <= steps <= schedule.steps - offset:
        raise PSAError(f"sampling steps must be between 1 and {schedule.steps - offset}, got {steps}")
    ratio = schedule.steps // steps
    return (np.arange(steps) * ratio).round()[::-1].astype(np.int32) + offset


def ddim(
    model: Callable[[Float[Array, "b h w c"], Int[Array, ""]], Float[Array, "b h w c"]],
    latents: Float[Array, "b h w c"],
    schedule: NoiseSchedule,
    timesteps: Int[np.ndarray, " n"],
) -> Float[Array, "b h w c"]:
    """Deterministic DDIM (arXiv 2010.02502, η = 0) from x_T to x_0, without clipping.

    Args:
      model: (x_t, t) -> prediction, guidance included.
      timesteps: decreasing; the step after t is t − T/n, and ᾱ of a step below 0 is ᾱ_0 (`set_alpha_to_one` false).
    """
    gap = schedule.steps // len(timesteps)
    previous = timesteps - gap

    def step(x, times):
        now, after = times
        alpha = schedule.alphas_cumprod[now]
        alpha_after = schedule.alphas_cumprod[jnp.maximum(after, 0)]
        output = model(x, now)
        if schedule.prediction == "epsilon":
            noise = output
            clean = (x - jnp.sqrt(1.0 - alpha) * noise) / jnp.sqrt(alpha)
        else:
            clean = jnp.sqrt(alpha) * x - jnp.sqrt(1.0 - alpha) * output
            noise = jnp.sqrt(alpha) * output + jnp.sqrt(1.0 - alpha) * x
        return jnp.sqrt(alpha_after) * clean + jnp.sqrt(1.0 - alpha_after) * noise, None

    times = jnp.asarray(timesteps, jnp.int32), jnp.asarray(previous, jnp.int32)
    return jax.lax.scan(step, latents, times)[0]
