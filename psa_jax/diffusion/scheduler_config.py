"""From a folder's scheduler config to a sampler: a key is honoured, refused by name, or not the sampler's.

What a class of diffusers does not read it ignores, and so it is here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from psa_jax.diffusion import sampler_tables
from psa_jax.diffusion.samplers import Sampler
from psa_jax.diffusion.schedule import NoiseSchedule, read_keys
from psa_jax.diffusion.timesteps import FINAL_SIGMAS, SPACINGS
from psa_jax.errors import PSAError

# Name -> (class in diffusers, table).
SAMPLERS: dict[str, tuple[str, Callable[..., Sampler]]] = {
    "ddim": ("DDIMScheduler", sampler_tables.ddim),
    "euler": ("EulerDiscreteScheduler", sampler_tables.euler),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", sampler_tables.euler_ancestral),
    "dpmsolver++": ("DPMSolverMultistepScheduler", sampler_tables.dpmsolver),
    "unipc": ("UniPCMultistepScheduler", sampler_tables.unipc),
    "pndm": ("PNDMScheduler", sampler_tables.pndm),
}

# Keys that a class of diffusers reads and that have one supported value, with diffusers' defaults.
FIXED = {"dpmsolver++": {"algorithm_type": "dpmsolver++"}}

# What a key may be set to where the sampler in use reads it; anything else is refused.
SUPPORTED = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": FINAL_SIGMAS,
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++",),
}
SOLVER_TYPES = {"dpmsolver++": ("midpoint", "heun"), "unipc": ("bh1", "bh2")}
# The same for keys that a class of diffusers reads and no sampler here: what they switch on is not implemented.
_OFF, _NONE = (False, None), (None,)
_SPACED = {"use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF}
_LIMITS = {"sigma_min": _NONE, "sigma_max": _NONE}
_FLOW = {"use_flow_sigmas": _OFF, "use_dynamic_shifting": _OFF}
_CLIPPED = {"thresholding": _OFF}
NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddim": _CLIPPED,
    "euler": _SPACED | _LIMITS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    "euler-ancestral": {},
    "dpmsolver++": _CLIPPED
    | _SPACED
    | _FLOW
    | {
        "use_lu_lambdas": _OFF,
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
    "unipc": _CLIPPED | _SPACED | _LIMITS | _FLOW | {"solver_p": _NONE, "shift_terminal": _NONE},
    "pndm": {},
}
# They qualify what is refused above, so they mean nothing here.
INERT = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")

# Settings of one solver that another takes for its own, by the class that reads them: key -> value -> what it takes.
_SAME_SOLVER = {"algorithm_type": {"deis": "dpmsolver++"}}
_MIDPOINT = {"solver_type": dict.fromkeys(("bh1", "bh2", "logrho"), "midpoint")}
TAKEN_FOR: dict[str, dict[str, dict[str, str]]] = {
    "DPMSolverMultistepScheduler": _MIDPOINT | _SAME_SOLVER,
    "DPMSolverSinglestepScheduler": _MIDPOINT | _SAME_SOLVER,
    "DEISMultistepScheduler": {
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
    },
    "UniPCMultistepScheduler": {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
}


def _keys(name: str) -> dict[str, Any]:
    """The keys that a sampler reads besides those of the noise, with diffusers' defaults."""
    parameters = inspect.signature(SAMPLERS[name][1]).parameters.values()
    keys = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "eta"}
    return keys | FIXED.get(name, {})


def sampler_name(config: Mapping[str, Any], where: str = "scheduler_config.json") -> str:
    """The sampler that a folder's config asks for."""
    wanted = config.get("_class_name")
    for name, (scheduler, _) in SAMPLERS.items():
        if wanted == scheduler:
            return name
    raise PSAError(f"{where}: the scheduler {wanted!r} is not supported; {_way_out(config, where)}")


def _way_out(config: Mapping[str, Any], where: str) -> str:
    given = {name: _config_for(config, name) for name in SAMPLERS}
    able = [name for name in SAMPLERS if not _refusal(given[name], name, where) and _ends(given[name], name, where)]
    return f"choose a sampler: {', '.join(able)}" if able else "no sampler can take its place"


def _ends(config: Mapping[str, Any], name: str, where: str) -> bool:
    """Whether a sampler has weights with these settings, whatever the steps: see `sampler_tables`."""
    values = read_keys(config, _keys(name), where)
    if name == "ddim":
        no_signal = config.get("rescale_betas_zero_snr") and values["timestep_spacing"] != "leading"
        return not no_signal or config.get("prediction_type", "epsilon") != "epsilon"
    if name == "unipc" and values["final_sigmas_type"] == "zero":
        return values["solver_type"] == "bh2" and values["predict_x0"] and values["lower_order_final"]
    return name != "unipc" or values["solver_order"] < 3 or values["lower_order_final"]


def _config_for(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What diffusers' class `name` makes of a folder's config: `from_config` of that of the folder's own scheduler."""
    own, scheduler = config.get("_class_name"), SAMPLERS[name][0]
    values = dict(config)
    if own != scheduler:
        # diffusers lists here what the folder does not say: its own class's defaults, or its pipeline's corrections.
        for key in config.get("_use_default_values", ()):
            values.pop(key, None)
        values = _taken(values, own)
    values = _taken(values, scheduler)
    if name == "pndm":
        values["rescale_betas_zero_snr"] = False  # diffusers' class does not know it
        if own != scheduler:  # asked for by name it is PLMS, as every Stable Diffusion uses it
            values = {"skip_prk_steps": True} | values
    return values


def _taken(values: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    for key, names in (TAKEN_FOR.get(scheduler, {}) if isinstance(scheduler, str) else {}).items():
        value = values.get(key)
        if isinstance(value, str) and value in names:
            values = values | {key: names[value]}
    return values


def _refusal(config: Mapping[str, Any], name: str, where: str) -> str | None:
    """The first thing that a config (of `_config_for`) asks of a sampler and that is not done."""
    return next(_refusals(config, name, where), None)


def _refusals(config: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    values = read_keys(config, _keys(name), where)
    read = {key: (values[key], allowed) for key, allowed in SUPPORTED.items() if key in values}
    if name in SOLVER_TYPES:
        read["solver_type"] = values["solver_type"], SOLVER_TYPES[name]
    other = {key: (config[key], allowed) for key, allowed in NEUTRAL[name].items() if key in config}
    for key, (value, allowed) in (read | other).items():
        if value not in allowed:
            yield f"{where}: {key} {value!r} is not supported by {name} (only {', '.join(map(str, allowed))})"
    if not all(type(step) is int for step in values.get("disable_corrector", ())):
        yield f"{where}: disable_corrector must be a list of steps, not {config['disable_corrector']!r}"
    if config.get("prediction_type") == "sample" and name in ("euler-ancestral", "pndm"):
        yield f"{where}: prediction_type 'sample' is not supported by {name}"


def sampler_from_config(
    config: Mapping[str, Any],
    steps: int,
    name: str | None = None,
    *,
    eta: float = 0.0,
    karras: bool | None = None,
    where: str = "scheduler_config.json",
) -> Sampler:
    """The sampler of a folder, or another one with the folder's noise.

    Args:
      config: content of `scheduler_config.json`, or as a pipeline corrected it (`psa_jax.interop.folder`).
      steps: sampling steps.
      name: one of SAMPLERS; None for the folder's own. Another one takes over the keys that it shares with the folder's
        and has its own defaults for the rest, as diffusers' `from_config` does.
      eta: DDIM's η.
      karras: Karras' noise levels; None for what the config says.
      where: names the config in errors.
    """
    if name is not None and name not in SAMPLERS:
        raise PSAError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    name = sampler_name(config, where) if name is None else name
    folder, config = config, _config_for(config, name)
    if refusal := _refusal(config, name, where):
        raise PSAError(f"{refusal}; {_way_out(folder, where)}")
    values, schedule = read_keys(config, _keys(name), where), NoiseSchedule.from_config(config, where)
    if karras and "use_karras_sigmas" not in values:
        able = ", ".join(other for other in SAMPLERS if "use_karras_sigmas" in _keys(other))
        raise PSAError(f"Karras' noise levels are not supported by {name}; use one of {able}")
    if karras is not None and "use_karras_sigmas" in values:
        values["use_karras_sigmas"] = karras
    if name == "ddim":
        values["eta"] = eta
    elif eta:
        raise PSAError(f"eta is DDIM's; {name} does not use it")
    return SAMPLERS[name][1](
        schedule, steps, **{key: value for key, value in values.items() if key not in FIXED.get(name, {})}
    )
