"""The forward process: betas, cumulative products, noising. Arrays of T steps in float32."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from psa_jax.errors import PSAError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε. `prediction` says what the UNet was trained to output."""

    alphas_cumprod: Float[Array, " t"]
    prediction: str = dataclasses.field(default="epsilon", metadata={"static": True})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "scheduler_config.json") -> "NoiseSchedule":
        """From diffusers' `scheduler_config.json`; raises PSAError for what is not implemented."""
        steps = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float32) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, steps, dtype=np.float32)
        else:
            raise PSAError(f"{where}: beta_schedule {kind!r} is not supported (only scaled_linear, linear)")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise PSAError(f"{where}: prediction_type {prediction!r} is not supported (only epsilon, v_prediction)")
        for key in ("trained_betas", "rescale_betas_zero_snr", "thresholding"):
            if config.get(key):
                raise PSAError(f"{where}: {key} is not supported")
        return cls(jnp.asarray(np.cumprod(1.0 - betas, dtype=np.float32)), prediction)

    @property
    def steps(self) -> int:
        """Number of training timesteps T."""
        return self.alphas_cumprod.shape[0]

    def signal_to_noise(self) -> Float[Array, " t"]:
        """ᾱ/(1 − ᾱ)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def _factors(self, timesteps: Int[Array, " b"], rank: int) -> tuple[Array, Array]:
        alpha = self.alphas_cumprod[timesteps].reshape(-1, *(1,) * (rank - 1))
        return jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)

    def add_noise(
        self, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Noisy latents at the given timesteps."""
        signal, sigma = self._factors(timesteps, latents.ndim)
        return signal * latents + sigma * noise

    def target(
        self, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """What the UNet should output: ε, or v = √ᾱ·ε − √(1 − ᾱ)·x_0."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._factors(timesteps, latents.ndim)
        return signal * noise - sigma * latents
