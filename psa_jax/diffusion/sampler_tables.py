"""Tables of the samplers: one function each, from a noise schedule and settings to a `Sampler`.

Keyword arguments have the names and defaults of keys in diffusers' configs. `psa_jax.diffusion.sampler_registry` lists
the functions. Latents are x = signal·x̂ + sigma·ε̂ with signal² + sigma² = 1, x̂ the clean latents and ε̂ the noise.
Weights are computed in float64 and stored in float32. Every function raises PSAError for steps or settings for which
it has no table.
"""

import math

import numpy as np
from jaxtyping import Float

from psa_jax.diffusion.predictions import prediction_of
from psa_jax.diffusion.samplers import Row, Sampler
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.diffusion.timesteps import euler_levels, noise_levels, solver_levels, spaced_timesteps
from psa_jax.errors import PSAError

Weights = Float[np.ndarray, " n"]


def _alphas(schedule: NoiseSchedule) -> Float[np.ndarray, " t"]:
    return np.asarray(schedule.alphas_cumprod)


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
    alphas: Float[np.ndarray, " t"], times: Float[np.ndarray, " n"], gap: int | np.ndarray, set_alpha_to_one: bool
) -> tuple[Weights, Weights]:
    """ᾱ at the timesteps and at `gap` before them; before the first timestep it is 1 or ᾱ_0."""
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
    """DDIM: x' = √ᾱ'·x̂ + √(1 − ᾱ' − s²)·ε̂ + s·noise with s = η·√((1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ')).

    Args:
      eta: 0 is deterministic, 1 is as noisy as DDPM.

    Source: arXiv 2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise PSAError(f"eta must be between 0 and 1, got {eta}")
    alphas = _alphas(schedule)
    times = spaced_timesteps(timestep_spacing, len(alphas), steps, steps_offset).round()
    now, after = _step_back(alphas, times, len(alphas) // steps, set_alpha_to_one)
    prediction = prediction_of(schedule.prediction)
    if prediction.needs_signal and now[0] == 0:
        raise PSAError(
            "rescale_betas_zero_snr leaves no signal at the first timestep, where ddim cannot use prediction_type "
            f"{schedule.prediction}: use timestep_spacing leading or another sampler"
        )
    spread = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    towards = np.sqrt(np.maximum(1 - after - spread**2, 0))
    factors = np.sqrt(now), np.sqrt(1 - now)
    noise_latents, noise_output = prediction.noise(*factors)
    return _sampler(
        times,
        keep=prediction.clean(*factors),
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
    """Table of x' = (s'/s)·x + (1 − s'/s)·x̂ + noise, in latents whose signal is scaled to 1; s' is `towards`."""
    now = sigmas[:-1].astype(float)
    signal = 1 / np.sqrt(now**2 + 1)
    clean_latents, clean_output = prediction_of(schedule.prediction).clean(signal, now * signal)
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
    """Euler: Euler's method along dx/dσ = ε̂. Source: arXiv 2206.00364, algorithm 2 without churn."""
    table = noise_levels(_alphas(schedule))
    times, sigmas = euler_levels(table, timestep_spacing, steps, steps_offset, use_karras_sigmas, final_sigmas_type)
    return _euler(schedule, timestep_spacing, times, sigmas, sigmas[1:].astype(float), 0.0)


def euler_ancestral(
    schedule: NoiseSchedule, steps: int, *, timestep_spacing: str = "linspace", steps_offset: int = 0
) -> Sampler:
    """Euler ancestral: a step to s' = σ'²/σ below the next level σ', then fresh noise of deviation √(σ'² − s'²)."""
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
    """DPM-Solver++, multistep, of order 1 to 3.

    With s = sigma/signal, h = ln(s/s'), h₀ and h₁ the h of the steps before, φ = e^(−h) − 1,
    Δ₀ = (h/h₀)·(x̂ − x̂₀), Δ₁ = (h/h₁)·(x̂₀ − x̂₁):
        order 1  x' = (sigma'/sigma)·x − signal'·φ·x̂
        order 2  and − signal'·φ/2·Δ₀ ("midpoint") or + signal'·(φ/h + 1)·Δ₀ ("heun")
        order 3  and + signal'·(φ/h + 1)·(Δ₀ + h₀·Δ) − signal'·((φ + h)/h² − 1/2)·h·Δ, Δ = (Δ₀ − Δ₁)/(h₀ + h₁).

    Source: arXiv 2211.01095, algorithm 2; arXiv 2206.00927, appendix B.
    """
    times, sigmas = solver_levels(
        noise_levels(_alphas(schedule)), timestep_spacing, steps, steps_offset, use_karras_sigmas, final_sigmas_type,
        smallest_lambda=lambda_min_clipped, round_karras=beta_schedule != "squaredcos_cap_v2",
    )  # fmt: skip
    count, levels = len(times), sigmas.astype(float)
    signal = 1 / np.sqrt(levels**2 + 1)
    sigma = levels * signal
    few = lower_order_final and count < 15
    orders = np.minimum(np.arange(count) + 1, solver_order)
    if count > 1 and few:
        orders[-2] = min(orders[-2], 2)
    if euler_at_final or final_sigmas_type == "zero" or few:
        orders[-1] = 1
    history = np.zeros((count, max(solver_order, 2)))
    for k, order in enumerate(orders):
        phi = levels[k + 1] / levels[k] - 1
        history[k, 0] = -phi
        if order == 1:
            continue
        h, h0 = np.log(levels[k] / levels[k + 1]), np.log(levels[k - 1] / levels[k])
        first = np.array([1.0, -1.0, 0.0]) * (h / h0)  # weights of x̂, x̂₀, x̂₁ in Δ₀
        if order == 2:
            weights = first * (-phi / 2 if solver_type == "midpoint" else phi / h + 1)
        else:
            h1 = np.log(levels[k - 2] / levels[k - 1])
            second = (first - np.array([0.0, 1.0, -1.0]) * (h / h1)) / (h0 + h1)
            weights = (phi / h + 1) * (first + h0 * second) - ((phi + h) / h**2 - 0.5) * h * second
        history[k] += weights[: history.shape[1]]
    return _sampler(
        times,
        keep=prediction_of(schedule.prediction).clean(signal[:-1], sigma[:-1]),
        history=history * signal[1:, None],
        latents=sigma[1:] / sigma[:-1],
    )


def unipc(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: tuple = (),
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
) -> Sampler:
    """UniPC, multistep: every output also corrects the latents that it was predicted from.

    A step from noise level s to s' goes x' = a·x + Σ p_j·m_j from the corrected x (UniP), m the x̂ or, without
    `predict_x0`, the ε̂ of this and earlier calls. The next call's m' corrects x' to a·x + q'·m' + Σ q_j·m_j (UniC):
    as a is the same, x' is corrected by q'·m' + Σ (q_j − p_j)·m_j, and the corrected x is never kept.

    Args:
      disable_corrector: steps, from 0, whose result is not corrected.

    Source: arXiv 2302.04867, algorithms 5 to 8.
    """
    table = noise_levels(_alphas(schedule))
    times, sigmas = solver_levels(table, timestep_spacing, steps, steps_offset, use_karras_sigmas, final_sigmas_type)
    if use_karras_sigmas and final_sigmas_type == "sigma_min":
        sigmas[-1] = sigmas[-2]
    count, levels = len(times), sigmas.astype(float)
    signal = 1 / np.sqrt(levels**2 + 1)
    sigma = levels * signal
    scale, other = (signal, sigma) if predict_x0 else (sigma, signal)
    history, correction = np.zeros((count, solver_order + 1)), np.zeros(solver_order + 1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lambdas = -np.log(levels)
        for k in range(count):
            order = min(solver_order, k + 1, count - k if lower_order_final else count)
            before = lambdas[k - order + 1 : k][::-1]
            predictor, corrector = _unified(lambdas[k], lambdas[k + 1], before, solver_type, predict_x0)
            ratio = other[k + 1] / other[k]
            history[k] = ratio * correction
            history[k, :order] += scale[k + 1] * predictor
            correction = np.zeros(solver_order + 1)
            if k not in disable_corrector:
                correction[: order + 1] = scale[k + 1] * corrector
                correction[1 : order + 1] -= scale[k + 1] * predictor
    if not np.isfinite(history).all():
        raise PSAError(
            f"unipc ends in no finite picture with solver_type {solver_type}, predict_x0 {predict_x0}, "
            f"lower_order_final {lower_order_final} and final_sigmas_type {final_sigmas_type}; "
            "choose another sampler or set them to bh2, true, true and zero"
        )
    prediction = prediction_of(schedule.prediction)
    convert = prediction.clean if predict_x0 else prediction.noise
    return _sampler(
        times,
        keep=convert(signal[:-1], sigma[:-1]),
        history=history,
        latents=other[1:] / other[:-1],
    )


def _unified(
    start: float, end: float, before: np.ndarray, solver_type: str, predict_x0: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of m, newest first, as multiples of signal' (sigma' without `predict_x0`): p of UniP, then q', q of UniC.

    Args:
      start, end: λ = −log s at the start and the end of the step.
      before: λ of the earlier calls that the order uses, newest first.
    """
    h = end - start
    signed = -h if predict_x0 else h
    phi, order = np.expm1(signed), len(before) + 1
    base = signed if solver_type == "bh1" else phi
    ratios = np.append((before - start) / h, 1.0)
    powers, right = ratios ** np.arange(order)[:, None], np.zeros(order)
    term = phi / signed - 1
    for i in range(order):
        right[i] = term * math.factorial(i + 1) / base
        term = term / signed - 1 / math.factorial(i + 2)
    # Orders 1 and 2 are solved approximately, as in the paper's code and in diffusers.
    predicting = np.full(order - 1, 0.5) if order <= 2 else _solve(powers[:-1, :-1], right[:-1])
    correcting = np.full(1, 0.5) if order == 1 else _solve(powers, right)
    predictor, corrector = np.zeros(order), np.zeros(order + 1)
    predictor[1:], corrector[2:], corrector[0] = predicting / ratios[:-1], correcting[:-1] / ratios[:-1], correcting[-1]
    predictor[0], corrector[1] = -predictor[1:].sum(), -corrector[2:].sum() - corrector[0]
    predictor, corrector = -base * predictor, -base * corrector
    predictor[0] -= phi
    corrector[1] -= phi
    return predictor, corrector


def _solve(matrix: Float[np.ndarray, "n n"], right: Weights) -> Weights:
    """Solution for powers of ratios, or NaN where a step of infinite or zero length leaves none."""
    whole = np.isfinite(matrix).all() and np.isfinite(right).all() and len(np.unique(matrix[1])) == len(right)
    return np.linalg.solve(matrix, right) if whole else np.full(len(right), np.nan)


# Adams–Bashforth weights of the outputs, newest first. The second call repeats the first step with the mean of both
# outputs; later calls skip its output while their order grows.
_FOURTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
_PLMS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [*_FOURTH[:3], 0, _FOURTH[3]],
        [*_FOURTH, 0],
    ]
)


def pndm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
    skip_prk_steps: bool = False,
) -> Sampler:
    """PNDM: a fourth-order multistep rule in the outputs.

    With `skip_prk_steps` (PLMS) the order grows over the first of n + 1 calls. Otherwise the first three steps are
    Runge-Kutta steps, and there are n + 9 calls.

    x' = √(ᾱ'/ᾱ)·x − (ᾱ' − ᾱ)/(ᾱ·√(1 − ᾱ') + √(ᾱ·(1 − ᾱ)·ᾱ'))·ε̂. Source: arXiv 2202.09778, equations 9, 12 and 13.
    """
    alphas = _alphas(schedule)
    spaced = spaced_timesteps(timestep_spacing, len(alphas), steps, steps_offset).round()
    gap = len(alphas) // steps
    if skip_prk_steps:
        times = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
        weights = _PLMS[np.arange(len(times)).clip(max=5)]
        # The second call repeats the first step, so it starts one gap above its own timestep.
        again = np.arange(len(times)) == 1
        starts, strides = times + gap * again, gap
    else:
        if steps < 4:
            raise PSAError(f"pndm with skip_prk_steps false needs 4 sampling steps or more, got {steps}")
        times, starts, strides, weights = _with_runge_kutta(spaced, gap)
        again = (np.arange(len(times)) < 12) & (np.arange(len(times)) % 4 > 0)
    now, after = _step_back(alphas, starts, strides, set_alpha_to_one)
    slope = -(after - now) / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
    noise_latents, noise_output = prediction_of(schedule.prediction).noise(np.sqrt(now), np.sqrt(1 - now))
    whole = np.sqrt(after / now) + slope * noise_latents
    latents, history = whole.copy(), (slope * noise_output)[:, None] * weights
    step = history.copy()
    for k in np.flatnonzero(again):
        # The call starts from the same latents as the one before: (x − Σ history·m)/latents of that call.
        latents[k] /= whole[k - 1]
        history[k, 1:] -= latents[k] * step[k - 1, :-1]
    return _sampler(times, keep=(0.0, 1.0), history=history, latents=latents)


def _with_runge_kutta(spaced: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps of PNDM's calls, the starts and lengths of their steps, and weights of the outputs by lag."""
    half, ends = gap // 2, np.repeat(spaced[1:4], 4)
    times = np.concatenate([ends + np.tile([0, half, half, 0], 3), spaced[3:]])
    times[0:12:4] = spaced[:3]
    starts = np.concatenate([np.repeat(spaced[:3], 4), spaced[3:]])
    reach = times - np.concatenate([np.tile([half, 0, half, 0], 3), np.full(len(spaced) - 3, gap)])
    weights = np.zeros((len(times), 13))
    weights[:12, 0] = 1
    weights[3:12:4, :4] = 1 / 6, 1 / 3, 1 / 3, 1 / 6
    counting = np.concatenate([[0, 4, 8], np.arange(12, len(times))])
    for k in range(12, len(times)):
        weights[k, k - counting[counting <= k][:-5:-1]] = _FOURTH
    return times, starts, (starts - reach).astype(int), weights
