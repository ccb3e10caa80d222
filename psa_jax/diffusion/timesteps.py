"""Timesteps and noise levels σ of a sampler's model calls, in numpy, computed before tracing."""

import numpy as np
from jaxtyping import Float

from psa_jax.errors import PSAError

SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")


def spaced_timesteps(
    spacing: str, train: int, steps: int, offset: int = 0, *, last: int | None = None, without_lowest: bool = False
) -> Float[np.ndarray, " n"]:
    """Timesteps from noisy to clean; those of "linspace" are not yet rounded.

    Args:
      spacing: "leading" multiples of ⌊T/n⌋ from 0, shifted by `offset`; "linspace" from 0 to T − 1, both included;
        "trailing" multiples of T/n down from T, less 1. Source: arXiv 2305.08891, table 2.
      train: number of training timesteps T.
      steps: number of sampling steps n.
      last: use only the timesteps below this one; None for all.
      without_lowest: space n + 1 of them and leave out the lowest ("leading" and "linspace").

    Raises:
      PSAError: more steps than timesteps, or an offset beyond the last timestep.
    """
    last = train if last is None else last
    drop = 0 if spacing == "trailing" else int(without_lowest)
    limit = last - drop - (offset if spacing == "leading" else 0)
    if not 1 <= steps <= limit:
        raise PSAError(f"sampling steps must be between 1 and {limit}, got {steps}")
    points = steps + drop
    if spacing == "leading":
        times = np.arange(points)[drop:] * float(last // points) + offset
    elif spacing == "linspace":
        times = np.linspace(0, last - 1, points)[drop:]
    else:
        # For some n, rounding gives n + 1 timesteps, the last of them below 0 (as in diffusers): it is left out.
        times = np.arange(last, 0, -train / steps).round()[:steps][::-1] - 1.0
    if times[-1] > train - 1:
        raise PSAError(
            f"{steps} sampling steps with steps_offset {offset} pass the last of {train} timesteps; use fewer"
        )
    return times[::-1]


def noise_levels(alphas_cumprod: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Noise levels σ = √((1 − ᾱ)/ᾱ) of latents whose signal is scaled to 1. ᾱ = 0 counts as 2⁻²⁴, as in diffusers."""
    alphas = np.where(alphas_cumprod == 0, np.float32(2**-24), alphas_cumprod)
    return np.sqrt((1 - alphas) / alphas)


def karras_sigmas(high: float, low: float, steps: int) -> Float[np.ndarray, " n"]:
    """Noise levels with equally spaced σ^(1/7), from high to low. Source: arXiv 2206.00364, equation 5 with ρ = 7."""
    high, low = high ** (1 / 7), low ** (1 / 7)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** 7


def timesteps_of(sigmas: Float[np.ndarray, " n"], table: Float[np.ndarray, " t"]) -> Float[np.ndarray, " n"]:
    """Timesteps, with fractions, of noise levels, by linear interpolation in log σ.

    Args:
      sigmas: noise levels.
      table: σ of every training timestep.
    """
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _with_last(sigmas: np.ndarray, final: str, table: np.ndarray) -> np.ndarray:
    return np.append(sigmas, table[0] if final == "sigma_min" else 0.0).astype(np.float32)


def euler_levels(
    table: Float[np.ndarray, " t"], spacing: str, steps: int, offset: int, karras: bool = False, final: str = "zero"
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n+1"]]:
    """Timesteps and σ of the Euler samplers. Timesteps keep their fractions, and σ is interpolated between them.

    Args:
      table: σ of every training timestep.
      spacing, steps, offset: as in `spaced_timesteps`.
      karras: use Karras' levels between the first and the last that `spacing` gives.
      final: σ after the last step: "zero", or "sigma_min" for the smallest trained one.

    Returns:
      Timesteps [n] and σ [n + 1].

    Raises:
      PSAError: as `spaced_timesteps`.
    """
    times = spaced_timesteps(spacing, len(table), steps, offset).astype(np.float32)
    sigmas = np.interp(times, np.arange(len(table)), table)
    if karras:
        sigmas = karras_sigmas(float(sigmas[0]), float(sigmas[-1]), steps)
        times = timesteps_of(sigmas, table).astype(np.float32)
    return times, _with_last(sigmas, final, table)


def solver_levels(
    table: Float[np.ndarray, " t"],
    spacing: str,
    steps: int,
    offset: int,
    karras: bool = False,
    final: str = "zero",
    *,
    smallest_lambda: float = -np.inf,
    round_karras: bool = True,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n+1"]]:
    """Timesteps and σ of DPM-Solver and UniPC. Timesteps are whole; of n + 1 the lowest is left out.

    Args:
      table, spacing, steps, offset, final: as in `euler_levels`.
      karras: use Karras' levels between the largest and the smallest trained one.
      smallest_lambda: timesteps with λ = −log σ below this are not used.
      round_karras: round Karras' timesteps; otherwise truncate them, as diffusers does with cosine betas.

    Returns:
      Timesteps [n] and σ [n + 1].

    Raises:
      PSAError: as `spaced_timesteps`.
    """
    last = len(table) - int(np.searchsorted(-np.log(table)[::-1], smallest_lambda))
    if karras:
        if not 1 <= steps <= len(table):
            raise PSAError(f"sampling steps must be between 1 and {len(table)}, got {steps}")
        sigmas = karras_sigmas(float(table[-1]), float(table[0]), steps)
        times = timesteps_of(sigmas, table)
        times = times.round() if round_karras else np.trunc(times)
    else:
        times = spaced_timesteps(spacing, len(table), steps, offset, last=last, without_lowest=True).round()
        sigmas = np.interp(times, np.arange(len(table)), table)
    return times.astype(np.float32), _with_last(sigmas, final, table)
