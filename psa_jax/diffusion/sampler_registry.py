"""All samplers in one table. Imports nothing heavy: the command line reads it for its help.

A new sampler is a function in `psa_jax.diffusion.sampler_tables` and an entry here. The function's keyword arguments
are keys of diffusers' `scheduler_config.json`, with diffusers' defaults. Every other key that diffusers' class reads
stands in `fixed` or `neutral`, with the values that change nothing here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Keys = Mapping[str, Any]
Allowed = Mapping[str, tuple[Any, ...]]
_NO_KEYS: Keys = MappingProxyType({})


class SamplerEntry(NamedTuple):
    """One sampler.

    Attributes:
      scheduler: its class in diffusers.
      table: its function in `psa_jax.diffusion.sampler_tables`.
      karras: reads `use_karras_sigmas`.
      solver_types: supported values of `solver_type`; empty where the sampler does not read it.
      fixed: keys with one supported value, and diffusers' defaults.
      neutral: keys that diffusers' class reads and this sampler does not -> the values that switch nothing on.
      refused_predictions: values of `prediction_type` that diffusers' class does not support.
      ignored: keys of the noise schedule that diffusers' class does not read -> the value that takes their place.
      replacing: defaults where the sampler takes the place of another one that a folder names.
      is_finite: settings -> whether the sampler ends in finite latents with them, for any number of steps. Settings
        are the sampler's keys, `rescale_betas_zero_snr` and the prediction's `needs_signal`.
    """

    scheduler: str
    table: str
    karras: bool = False
    solver_types: tuple[str, ...] = ()
    fixed: Keys = _NO_KEYS
    neutral: Allowed = _NO_KEYS
    refused_predictions: tuple[str, ...] = ()
    ignored: Keys = _NO_KEYS
    replacing: Keys = _NO_KEYS
    is_finite: Callable[[Keys], bool] = lambda settings: True


def _ddim_is_finite(settings: Keys) -> bool:
    no_signal = settings["rescale_betas_zero_snr"] and settings["timestep_spacing"] != "leading"
    return not (no_signal and settings["needs_signal"])


def _unipc_is_finite(settings: Keys) -> bool:
    if settings["final_sigmas_type"] == "zero":
        return settings["solver_type"] == "bh2" and settings["predict_x0"] and settings["lower_order_final"]
    return settings["solver_order"] < 3 or settings["lower_order_final"]


_OFF, _NONE = (False, None), (None,)
_CLIPPED = {"thresholding": _OFF}
_SPACED = {"use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF}
_LIMITS = {"sigma_min": _NONE, "sigma_max": _NONE}
_FLOW = {"use_flow_sigmas": _OFF, "use_dynamic_shifting": _OFF}
_VARIANCES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")

SAMPLERS = {
    "ddim": SamplerEntry("DDIMScheduler", "ddim", neutral=_CLIPPED, is_finite=_ddim_is_finite),
    "euler": SamplerEntry(
        "EulerDiscreteScheduler",
        "euler",
        karras=True,
        neutral=_SPACED | _LIMITS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "euler-ancestral": SamplerEntry(
        "EulerAncestralDiscreteScheduler", "euler_ancestral", refused_predictions=("sample",)
    ),
    "dpmsolver++": SamplerEntry(
        "DPMSolverMultistepScheduler",
        "dpmsolver",
        karras=True,
        solver_types=("midpoint", "heun"),
        fixed={"algorithm_type": "dpmsolver++"},
        neutral=_CLIPPED | _SPACED | _FLOW | {"use_lu_lambdas": _OFF, "variance_type": _VARIANCES},
    ),
    "unipc": SamplerEntry(
        "UniPCMultistepScheduler",
        "unipc",
        karras=True,
        solver_types=("bh1", "bh2"),
        neutral=_CLIPPED | _SPACED | _LIMITS | _FLOW | {"solver_p": _NONE, "shift_terminal": _NONE},
        is_finite=_unipc_is_finite,
    ),
    "pndm": SamplerEntry(
        "PNDMScheduler",
        "pndm",
        refused_predictions=("sample",),
        ignored={"rescale_betas_zero_snr": False},
        # PLMS, as every pipeline of Stable Diffusion uses it.
        replacing={"skip_prk_steps": True},
    ),
}


def with_karras() -> list[str]:
    """Names of the samplers that can use Karras' noise levels."""
    return [name for name, entry in SAMPLERS.items() if entry.karras]
