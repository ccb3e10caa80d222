"""The samplers' tables. Keyword arguments carry the names and defaults of the keys in diffusers' configs.

Throughout, latents are read as x = signal·x̂ + sigma·ε̂ with signal² + sigma² = 1: x̂ the clean latents, ε̂ the noise.
Weights are worked out in float64 and kept in float32.
"""

import math

import numpy as np
from jaxtyping import Float

from psa_jax.diffusion.samplers import Row, Sampler
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.diffusion.timesteps import euler_levels, noise_levels, solver_levels, spaced_timesteps
from psa_jax.errors import PSAError

Weights = Float[np.ndarray, " n"]


def _alphas(schedule: NoiseSchedule) -> Float[np.ndarray, " t"]:
    return np.asarray(schedule.alphas_cumprod)


def _clean(prediction: str, signal: Weights, sigma: Weights) -> tuple[Weights, Weights]:
    """Weights of the latents and of the output in x̂."""
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction == "v_prediction":
        return signal, -sigma
    return np.zeros_like(signal), np.ones_like(signal)


def _noise(prediction: str, signal: Weights, sigma: Weights) -> tuple[Weights, Weights]:
    """Weights of the latents and of the output in ε̂."""
    if prediction == "epsilon":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "v_prediction":
        return sigma, signal
    return 1 / sigma, -signal / sigma


def _sampler(
    timesteps: Float[np.ndarray, " n"],
    *,
    keep: tuple,
    history: np.ndarray,
    latents=0.0,
    output=0.0,
    noise=0.0,
    input_scale=1.0,
    init_scale: float = 1.0,
    clip: float | None = None,
) -> Sampler:
    def column(values) -> Weights:
        return np.broadcast_to(np.float32(values), timesteps.shape)

    rows = Row(
        timestep=np.float32(timesteps),
        input_scale=column(input_scale),
        keep_latents=column(keep[0]),
        keep_output=column(keep[1]),
        latents=column(latents),
        output=column(output),
        history=np.float32(history).reshape(len(timesteps), -1),
        noise=column(noise),
    )
    return Sampler(rows, np.asarray(init_scale, np.float32), clip, bool(np.any(rows.noise)))


def _step_back(
    alphas: Float[np.ndarray, " t"], times: Float[np.ndarray, " n"], gap: int, set_alpha_to_one: bool
) -> tuple[Weights, Weights]:
    """ᾱ at the timesteps and `gap` before them; what lies before the first is 1 or ᾱ_0."""
    now = times.astype(int)
    before = now - gap
    final = 1.0 if set_alpha_to_one else float(alphas[0])
    return alphas[now].astype(float), np.where(before < 0, final, alphas[before.clip(0)].astype(float))


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    set_alpha_to_one: bool = True,
    eta: float = 0.0,
) -> Sampler:
    """DDIM. x' = √ᾱ'·x̂ + √(1 − ᾱ' − s²)·ε̂ + s·noise, s = η·√((1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ')).

    Args:
      eta: 0 is deterministic, 1 is as noisy as DDPM.

    Source: arXiv 2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise PSAError(f"eta must be between 0 and 1, got {eta}")
    alphas = _alphas(schedule)
    times = spaced_timesteps(timestep_spacing, len(alphas), steps, steps_offset).round()
    now, after = _step_back(alphas, times, len(alphas) // steps, set_alpha_to_one)
    if schedule.prediction == "epsilon" and now[0] == 0:
        raise PSAError(
            "rescale_betas_zero_snr leaves no signal at the first timestep, where ddim cannot use prediction_type "
            "epsilon: use timestep_spacing leading or another sampler"
        )
    spread = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    towards = np.sqrt(np.maximum(1 - after - spread**2, 0))
    factors = schedule.prediction, np.sqrt(now), np.sqrt(1 - now)
    noise_latents, noise_output = _noise(*factors)
    return _sampler(
        times,
        keep=_clean(*factors),
        history=np.sqrt(after),
        latents=towards * noise_latents,
        output=towards * noise_output,
        noise=spread,
        clip=clip_sample_range if clip_sample else None,
    )


def _euler(
    schedule: NoiseSchedule,
    spacing: str,
    times: Weights,
    sigmas: Float[np.ndarray, " n+1"],
    towards: Weights,
    noise: Weights | float,
) -> Sampler:
    """x' = (s'/s)·x + (1 − s'/s)·x̂ + noise, in latents whose signal is scaled to 1; s' is `towards`."""
    now = sigmas[:-1].astype(float)
    signal = 1 / np.sqrt(now**2 + 1)
    clean_latents, clean_output = _clean(schedule.prediction, signal, now * signal)
    largest = float(sigmas.max())
    return _sampler(
        times,
        keep=(clean_latents * signal, clean_output),
        history=1 - towards / now,
        latents=towards / now,
        noise=noise,
        input_scale=signal,
        init_scale=math.sqrt(largest**2 + 1) if spacing == "leading" else largest,
    )


def euler(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
) -> Sampler:
    """Euler's method along dx/dσ = ε̂. Source: arXiv 2206.00364, algorithm 2 without churn."""
    table = noise_levels(_alphas(schedule))
    times, sigmas = euler_levels(table, timestep_spacing, steps, steps_offset, use_karras_sigmas, final_sigmas_type)
    return _euler(schedule, timestep_spacing, times, sigmas, sigmas[1:].astype(float), 0.0)


def euler_ancestral(
    schedule: NoiseSchedule, steps: int, *, timestep_spacing: str = "linspace", steps_offset: int = 0
) -> Sampler:
    """Euler's method to below the next σ', then noise up to it: s' = σ'²/σ and noise of √(σ'² − s'²)."""
    times, sigmas = euler_levels(noise_levels(_alphas(schedule)), timestep_spacing, steps, steps_offset)
    after = sigmas[1:].astype(float)
    towards = after**2 / sigmas[:-1]
    noise = np.sqrt(np.maximum(after**2 - towards**2, 0))
    return _euler(schedule, timestep_spacing, times, sigmas, towards, noise)


def dpmsolver(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    solver_order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
    lambda_min_clipped: float = -math.inf,
    beta_schedule: str = "linear",
) -> Sampler:
    """DPM-Solver++, multistep, order 1 or 2, in x = signal·x̂ + sigma·ε̂.

    With s = sigma/signal, h = ln(s/s'), h₀ the h of the step before, φ = e^(−h) − 1:
        order 1  x' = (sigma'/sigma)·x − signal'·φ·x̂
        order 2  and − signal'·φ/2·(h/h₀)·(x̂ − x̂₀) ("midpoint") or + signal'·(φ/h + 1)·(h/h₀)·(x̂ − x̂₀) ("heun").

    Source: arXiv 2211.01095, algorithm 2.
    """
    times, sigmas = solver_levels(
        noise_levels(_alphas(schedule)), timestep_spacing, steps, steps_offset, use_karras_sigmas, final_sigmas_type,
        smallest_lambda=lambda_min_clipped, round_karras=beta_schedule != "squaredcos_cap_v2",
    )  # fmt: skip
    count, levels = len(times), sigmas.astype(float)
    signal = 1 / np.sqrt(levels**2 + 1)
    sigma = levels * signal
    phi = levels[1:] / levels[:-1] - 1
    first_order = np.arange(count) == 0
    if euler_at_final or final_sigmas_type == "zero" or (lower_order_final and count < 15):
        first_order[-1] = True
    correction = np.zeros(count)
    for k in np.flatnonzero(~first_order) if solver_order == 2 else ():
        h, h_before = np.log(levels[k] / levels[k + 1]), np.log(levels[k - 1] / levels[k])
        correction[k] = (-phi[k] / 2 * h if solver_type == "midpoint" else phi[k] + h) / h_before * signal[k + 1]
    return _sampler(
        times,
        keep=_clean(schedule.prediction, signal[:-1], sigma[:-1]),
        history=np.stack([correction - signal[1:] * phi, -correction], axis=1),
        latents=sigma[1:] / sigma[:-1],
    )


# Adams–Bashforth weights of the outputs, newest first. The second call repeats the first step with the mean of both
# outputs and counts no further: its output is passed over while the orders build up.
_PLMS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)


def pndm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
) -> Sampler:
    """PNDM without Runge-Kutta steps (PLMS): a fourth-order multistep rule in the outputs, n + 1 calls.

    x' = √(ᾱ'/ᾱ)·x − (ᾱ' − ᾱ)/(ᾱ·√(1 − ᾱ') + √(ᾱ·(1 − ᾱ)·ᾱ'))·ε̂. Source: arXiv 2202.09778, equations 9 and 12.
    """
    alphas = _alphas(schedule)
    spaced = spaced_timesteps(timestep_spacing, len(alphas), steps, steps_offset).round()
    gap = len(alphas) // steps
    times = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
    # The second call takes the first step again, so it starts one gap above its own timestep.
    starts = times + gap * (np.arange(len(times)) == 1)
    now, after = _step_back(alphas, starts, gap, set_alpha_to_one)
    slope = -(after - now) / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
    noise_latents, noise_output = _noise(schedule.prediction, np.sqrt(now), np.sqrt(1 - now))
    latents = np.sqrt(after / now) + slope * noise_latents
    history = (slope * noise_output)[:, None] * _PLMS[np.arange(len(times)).clip(max=5)]
    if len(times) > 1:
        # It starts from x_0, which is (x_1 − history·m_0)/latents of the first call.
        latents[1] /= latents[0]
        history[1, 1] -= latents[1] * history[0, 0]
    return _sampler(times, keep=(0.0, 1.0), history=history, latents=latents)
