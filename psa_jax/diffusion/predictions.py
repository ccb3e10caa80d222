"""Kinds of prediction: what a UNet was trained to output, and everything that depends on it, in one table.

Latents are x = signal·x̂ + sigma·ε̂ with x̂ the clean latents, ε̂ the noise, signal = √ᾱ and sigma = √(1 − ᾱ). The names
are the values of `prediction_type` in diffusers' `scheduler_config.json`. A new kind is one entry in `PREDICTIONS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.errors import PSAError

Weights = tuple[Any, Any]
"""Weights of the latents and of the output, each an array of the arguments' shape or a number for all of them."""


class Prediction(NamedTuple):
    """One kind of prediction, as formulas in signal, sigma and the signal-to-noise ratio ᾱ/(1 − ᾱ).

    Attributes:
      target: (x̂, ε̂, signal, sigma) -> the output that the UNet is trained towards.
      clean: (signal, sigma) -> weights of x and of the output in x̂.
      noise: (signal, sigma) -> weights of x and of the output in ε̂.
      noise_error: signal-to-noise ratio -> factor from a squared error of the output to the squared error of ε̂.
      needs_signal: x̂ is undefined where signal = 0.
    """

    target: Callable[[Any, Any, Any, Any], Any]
    clean: Callable[[Any, Any], Weights]
    noise: Callable[[Any, Any], Weights]
    noise_error: Callable[[Any], Any]
    needs_signal: bool = False

    def clean_slope(self, alphas_cumprod: Float[Array, " b"]) -> Float[Array, " b"]:
        """∂x̂/∂output at each ᾱ. ᾱ below 1e-6 counts as 1e-6, so that the slope is finite without any signal."""
        sigma, signal = jnp.sqrt(1.0 - alphas_cumprod), jnp.sqrt(jnp.maximum(alphas_cumprod, 1e-6))
        _, slope = self.clean(signal, sigma)
        return jnp.broadcast_to(jnp.asarray(slope, sigma.dtype), sigma.shape)


PREDICTIONS = {
    "epsilon": Prediction(
        target=lambda clean, noise, signal, sigma: noise,
        clean=lambda signal, sigma: (1 / signal, -sigma / signal),
        noise=lambda signal, sigma: (0.0, 1.0),
        noise_error=jnp.ones_like,
        needs_signal=True,
    ),
    # Source: arXiv 2202.00512, section 4.
    "v_prediction": Prediction(
        target=lambda clean, noise, signal, sigma: signal * noise - sigma * clean,
        clean=lambda signal, sigma: (signal, -sigma),
        noise=lambda signal, sigma: (sigma, signal),
        noise_error=lambda snr: snr / (snr + 1.0),
    ),
    "sample": Prediction(
        target=lambda clean, noise, signal, sigma: clean,
        clean=lambda signal, sigma: (0.0, 1.0),
        noise=lambda signal, sigma: (1 / sigma, -signal / sigma),
        noise_error=lambda snr: snr,
    ),
}


def prediction_of(name: Any, where: str = "scheduler_config.json") -> Prediction:
    """The table's entry of a `prediction_type`.

    Args:
      where: names the configuration in the error.

    Raises:
      PSAError: an unknown kind; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in PREDICTIONS:
        raise PSAError(f"{where}: prediction_type {name!r} is not supported (only {', '.join(PREDICTIONS)})")
    return PREDICTIONS[name]
