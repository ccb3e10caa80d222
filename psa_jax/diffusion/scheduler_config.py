"""The sampler of a folder's scheduler config. Each key is applied, refused by name, or ignored as diffusers ignores it.

`psa_jax.diffusion.sampler_registry` lists the samplers and their keys.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from psa_jax.diffusion import sampler_tables
from psa_jax.diffusion.predictions import prediction_of
from psa_jax.diffusion.sampler_registry import SAMPLERS, with_karras
from psa_jax.diffusion.samplers import Sampler
from psa_jax.diffusion.schedule import DEFAULTS, NoiseSchedule, read_keys
from psa_jax.diffusion.timesteps import FINAL_SIGMAS, SPACINGS
from psa_jax.errors import PSAError

# Name of DDIM's setting that no file holds.
_ETA = "eta"
# Supported values of keys that several samplers read.
SUPPORTED = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": FINAL_SIGMAS,
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++",),
}
# Keys that only qualify an option refused in the registry.
INERT = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")

# Values of another solver's keys that a class of diffusers replaces by its own: class -> key -> value -> replacement.
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


def sampler_keys(name: str) -> dict[str, Any]:
    """Keys of diffusers' config that a sampler reads besides those of the noise schedule, with diffusers' defaults."""
    parameters = inspect.signature(_table(name)).parameters.values()
    keys = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != _ETA}
    return keys | dict(SAMPLERS[name].fixed)


def _table(name: str) -> Callable[..., Sampler]:
    return getattr(sampler_tables, SAMPLERS[name].table)


def sampler_name(config: Mapping[str, Any], where: str = "scheduler_config.json") -> str:
    """Name of the sampler that stands for the scheduler class in a folder's config.

    Args:
      config: content of `scheduler_config.json`.
      where: names the config in errors.

    Raises:
      PSAError: an unsupported class; the message lists the samplers that can take its place.
    """
    wanted = config.get("_class_name")
    for name, entry in SAMPLERS.items():
        if wanted == entry.scheduler:
            return name
    raise PSAError(f"{where}: the scheduler {wanted!r} is not supported; {_advice(config, where)}")


def _advice(config: Mapping[str, Any], where: str) -> str:
    """The samplers of the table that work with a folder's config, as advice at the end of an error."""
    given = {name: _config_for(config, name) for name in SAMPLERS}
    able = [n for n in SAMPLERS if not _refusal(given[n], n, where) and _is_finite(given[n], n, where)]
    return f"choose a sampler: {', '.join(able)}" if able else "no sampler can take its place"


def _is_finite(config: Mapping[str, Any], name: str, where: str) -> bool:
    prediction = prediction_of(config.get("prediction_type", DEFAULTS["prediction_type"]), where)
    schedule = {
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr"),
        "needs_signal": prediction.needs_signal,
    }
    return SAMPLERS[name].is_finite(read_keys(config, sampler_keys(name), where) | schedule)


def _config_for(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A folder's config as `from_config` of the sampler's class in diffusers reads it."""
    own, entry = config.get("_class_name"), SAMPLERS[name]
    values = dict(config)
    if own != entry.scheduler:
        # diffusers lists here the keys that no file holds: defaults of its own class, or a pipeline's corrections.
        for key in config.get("_use_default_values", ()):
            values.pop(key, None)
        values = _taken(values, own)
    values = _taken(values, entry.scheduler) | dict(entry.ignored)
    return values if own == entry.scheduler else dict(entry.replacing) | values


def _taken(values: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    for key, names in (TAKEN_FOR.get(scheduler, {}) if isinstance(scheduler, str) else {}).items():
        value = values.get(key)
        if isinstance(value, str) and value in names:
            values = values | {key: names[value]}
    return values


def _refusal(config: Mapping[str, Any], name: str, where: str) -> str | None:
    """The first setting of a config (as `_config_for` gives it) that a sampler does not support, as an error's text."""
    return next(_refusals(config, name, where), None)


def _refusals(config: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    entry, values = SAMPLERS[name], read_keys(config, sampler_keys(name), where)
    read = {key: (values[key], allowed) for key, allowed in SUPPORTED.items() if key in values}
    if entry.solver_types:
        read["solver_type"] = values["solver_type"], entry.solver_types
    other = {key: (config[key], allowed) for key, allowed in entry.neutral.items() if key in config}
    for key, (value, allowed) in (read | other).items():
        if value not in allowed:
            yield f"{where}: {key} {value!r} is not supported by {name} (only {', '.join(map(str, allowed))})"
    if not all(type(step) is int for step in values.get("disable_corrector", ())):
        yield f"{where}: disable_corrector must be a list of steps, not {config['disable_corrector']!r}"
    if (prediction := config.get("prediction_type")) in entry.refused_predictions:
        yield f"{where}: prediction_type {prediction!r} is not supported by {name}"


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

    Raises:
      PSAError: an unknown sampler, an unsupported scheduler class or key, or steps, η or Karras' levels that the
        sampler cannot use. The message lists the samplers that work with the config.
    """
    if name is not None and name not in SAMPLERS:
        raise PSAError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    name = sampler_name(config, where) if name is None else name
    folder, config = config, _config_for(config, name)
    if refusal := _refusal(config, name, where):
        raise PSAError(f"{refusal}; {_advice(folder, where)}")
    entry, table = SAMPLERS[name], _table(name)
    values, schedule = read_keys(config, sampler_keys(name), where), NoiseSchedule.from_config(config, where)
    if karras and not entry.karras:
        raise PSAError(f"Karras' noise levels are not supported by {name}; use one of {', '.join(with_karras())}")
    if karras is not None and entry.karras:
        values["use_karras_sigmas"] = karras
    if _ETA in inspect.signature(table).parameters:
        values[_ETA] = eta
    elif eta:
        raise PSAError(f"eta is DDIM's; {name} does not use it")
    return table(schedule, steps, **{key: value for key, value in values.items() if key not in entry.fixed})
