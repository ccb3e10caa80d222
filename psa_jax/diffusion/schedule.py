"""Noise schedule of training: betas, their cumulative products, noising. Arrays of T steps in float32."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from psa_jax.diffusion.predictions import prediction_of
from psa_jax.errors import PSAError

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
# Keys of a scheduler's config that define the noise schedule, with diffusers' defaults.
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def read_keys(config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of a scheduler config's keys.

    Args:
      config: content of `scheduler_config.json`.
      defaults: key -> value for an absent key, whose type the file's value must have.
      where: names the file in errors.

    Raises:
      PSAError: a value of another type.
    """
    values = {}
    for key, default in defaults.items():
        value, wanted = config.get(key, default), type(default)
        if value is None and default is False:
            value = False  # diffusers' optional switches may be null
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not wanted:
            raise PSAError(f"{where}: {key} must be a {'list' if wanted is tuple else wanted.__name__}, not {value!r}")
        values[key] = value
    return values


def linear_betas(beta_schedule: str, start: float, end: float, steps: int) -> Float[np.ndarray, " t"]:
    """β_t equally spaced from start to end ("linear"), or squares of equally spaced √β_t ("scaled_linear")."""
    if beta_schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float32) ** 2
    return np.linspace(start, end, steps, dtype=np.float32)


def cosine_betas(steps: int, largest: float = 0.999) -> Float[np.ndarray, " t"]:
    """β_t = 1 − f(t+1)/f(t) with f(t) = cos²(π/2·(t/T + 0.008)/1.008), at most `largest`.

    Source: arXiv 2102.09672, equation 17; diffusers' `squaredcos_cap_v2`.
    """
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - bar[1:] / bar[:-1], largest).astype(np.float32)


def zero_terminal_snr(alphas_cumprod: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """√ᾱ shifted so that the last is 0 and scaled so that the first stays. Source: arXiv 2305.08891, algorithm 1."""
    # In float32, as diffusers: the difference of near neighbours would not be the same otherwise.
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Noise schedule x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε, and the UNet's kind of prediction.

    Attributes:
      alphas_cumprod: ᾱ_t of all T timesteps.
      prediction: a key of `PREDICTIONS`.

    Source: arXiv 2006.11239, equation 4.
    """

    alphas_cumprod: Float[Array, " t"]
    prediction: str = dataclasses.field(default="epsilon", metadata={"static": True})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "scheduler_config.json") -> "NoiseSchedule":
        """Schedule of diffusers' `scheduler_config.json`.

        Args:
          config: its content.
          where: names the file in errors.

        Raises:
          PSAError: an unsupported or malformed value; the message names the key.
        """
        values = read_keys(config, DEFAULTS, where)
        beta_schedule, start, end = values["beta_schedule"], values["beta_start"], values["beta_end"]
        steps, prediction = values["num_train_timesteps"], values["prediction_type"]
        if beta_schedule not in BETA_SCHEDULES:
            raise PSAError(
                f"{where}: beta_schedule {beta_schedule!r} is not supported (only {', '.join(BETA_SCHEDULES)})"
            )
        prediction_of(prediction, where)
        if config.get("trained_betas"):
            raise PSAError(f"{where}: trained_betas is not supported")
        if steps < 2:
            raise PSAError(f"{where}: num_train_timesteps must be at least 2, not {steps}")
        if not 0 < start <= end < 1:
            raise PSAError(f"{where}: 0 < beta_start <= beta_end < 1 is needed, got {start} and {end}")
        betas = (
            cosine_betas(steps)
            if beta_schedule == "squaredcos_cap_v2"
            else linear_betas(beta_schedule, start, end, steps)
        )
        # Products of float32 factors kept in float64, as torch does.
        alphas = np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)
        if values["rescale_betas_zero_snr"]:
            alphas = zero_terminal_snr(alphas)
        return cls(jnp.asarray(alphas), prediction)

    @property
    def steps(self) -> int:
        """Number of training timesteps T."""
        return self.alphas_cumprod.shape[0]

    def signal_to_noise(self) -> Float[Array, " t"]:
        """Signal-to-noise ratio ᾱ/(1 − ᾱ) of every timestep."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def _factors(self, timesteps: Int[Array, " b"], rank: int) -> tuple[Array, Array]:
        alpha = self.alphas_cumprod[timesteps].reshape(-1, *(1,) * (rank - 1))
        return jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)

    def add_noise(
        self, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Noisy latents x_t.

        Args:
          latents: clean, scaled latents x_0.
          noise: standard normal ε.
          timesteps: t of each row.
        """
        signal, sigma = self._factors(timesteps, latents.ndim)
        return signal * latents + sigma * noise

    def target(
        self, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Training target of the UNet for x_t: ε, v = √ᾱ·ε − √(1 − ᾱ)·x_0, or x_0; arguments as `add_noise`."""
        return prediction_of(self.prediction).target(latents, noise, *self._factors(timesteps, latents.ndim))
