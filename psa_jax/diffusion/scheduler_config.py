"""From a folder's `scheduler_config.json` to a sampler: a key is honoured, refused by name, or another sampler's."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from psa_jax.diffusion import methods
from psa_jax.diffusion.samplers import Sampler
from psa_jax.diffusion.schedule import DEFAULTS, NoiseSchedule, read_keys
from psa_jax.diffusion.timesteps import FINAL_SIGMAS, SPACINGS
from psa_jax.errors import PSAError

# Name -> (class in diffusers, table).
SAMPLERS: dict[str, tuple[str, Callable[..., Sampler]]] = {
    "ddim": ("DDIMScheduler", methods.ddim),
    "euler": ("EulerDiscreteScheduler", methods.euler),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", methods.euler_ancestral),
    "dpmsolver++": ("DPMSolverMultistepScheduler", methods.dpmsolver),
    "pndm": ("PNDMScheduler", methods.pndm),
}

# Keys that a class of diffusers reads and that have one supported value, with diffusers' defaults.
FIXED = {"dpmsolver++": {"algorithm_type": "dpmsolver++"}, "pndm": {"skip_prk_steps": False}}

# What a key may be set to where the sampler in use reads it; anything else is refused.
SUPPORTED = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": FINAL_SIGMAS,
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "algorithm_type": ("dpmsolver++",),
    "skip_prk_steps": (True,),
}
# The same for keys that no sampler here reads: what they can switch on is not implemented.
NEUTRAL = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "trained_betas": (None,),
    "thresholding": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
}
# They qualify what is refused above, so they mean nothing here.
INERT = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")


def _keys(name: str) -> dict[str, Any]:
    """The keys that a sampler reads besides those of the noise, with diffusers' defaults."""
    parameters = inspect.signature(SAMPLERS[name][1]).parameters.values()
    keys = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "eta"}
    return keys | FIXED.get(name, {})


KNOWN = {*DEFAULTS, *NEUTRAL, *INERT}.union(*map(_keys, SAMPLERS))


def sampler_name(config: Mapping[str, Any], where: str = "scheduler_config.json") -> str:
    """The sampler that a folder's config asks for."""
    wanted = config.get("_class_name")
    for name, (scheduler, _) in SAMPLERS.items():
        if wanted == scheduler:
            return name
    raise PSAError(f"{where}: the scheduler {wanted!r} is not supported; choose a sampler: {', '.join(SAMPLERS)}")


def _refuse(config: Mapping[str, Any], values: Mapping[str, Any], name: str, own: bool, where: str) -> None:
    """Raises for what is set and not done. `values` are what the sampler reads, `own` if it is the folder's own."""
    read = {key: (values[key], allowed) for key, allowed in SUPPORTED.items() if key in values}
    other = {key: (config[key], allowed) for key, allowed in NEUTRAL.items() if key in config}
    for key, (value, allowed) in (read | other).items():
        if value not in allowed:
            names = ", ".join(map(str, allowed))
            raise PSAError(f"{where}: {key} {value!r} is not supported by {name} (only {names})")
    # Left out in silence these would change the pictures; a sampler that was asked for by name is not the folder's,
    # and has no use for what only the folder's own understood.
    switches = ["rescale_betas_zero_snr"] if name == "pndm" else []
    switches += [key for key in ("clip_sample", "use_karras_sigmas") if own and key not in values]
    for key in switches:
        if config.get(key):
            raise PSAError(f"{where}: {key} is not supported by {name}; choose another sampler or set it to false")
    unknown = [key for key in config if key not in KNOWN and not key.startswith("_")]
    if own and unknown:
        raise PSAError(f"{where}: unknown keys {', '.join(unknown)}; remove what {name} does not need")


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
      config: content of `scheduler_config.json`.
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
    scheduler, build = SAMPLERS[name]
    own = config.get("_class_name") == scheduler
    # diffusers lists here what was only a default of the class that wrote the config.
    config = {key: value for key, value in config.items() if key not in config.get("_use_default_values", ())}
    if name == "pndm" and not own:  # asked for by name it is PLMS, as every Stable Diffusion uses it
        config = {"skip_prk_steps": True} | config
    values = read_keys(config, _keys(name), where)
    _refuse(config, values, name, own, where)
    schedule = NoiseSchedule.from_config(config, where)
    if schedule.prediction == "sample" and name in ("euler-ancestral", "pndm"):
        raise PSAError(f"{where}: prediction_type 'sample' is not supported by {name}; use ddim, euler or dpmsolver++")
    if karras and "use_karras_sigmas" not in values:
        raise PSAError(f"Karras' noise levels are not supported by {name}; use euler or dpmsolver++")
    if karras is not None and "use_karras_sigmas" in values:
        values["use_karras_sigmas"] = karras
    if name == "ddim":
        values["eta"] = eta
    elif eta:
        raise PSAError(f"eta is DDIM's; {name} does not use it")
    return build(schedule, steps, **{key: value for key, value in values.items() if key not in FIXED.get(name, {})})
