"""JSON files of a folder in diffusers' layout, read and corrected as diffusers' pipelines do it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.interop.parts import CLASSES, MODELS, PIPELINES, SD, SDXL, TOKENIZERS, Config, read_config, read_scheduler
from psa_jax.json_input import read_json
from psa_jax.models.config import UNetConfig


@dataclasses.dataclass(frozen=True)
class Described:
    """Content of a folder's JSON files.

    Attributes:
      pipeline: SD or SDXL.
      configs: configurations by names of `MODELS`.
      tokenizers: name -> class in transformers.
      scheduler: content of `scheduler_config.json` with the class of `model_index.json`, as the pipeline corrects it.
        `_use_default_values` lists corrected keys that are not in the file. As in diffusers, a sampler of another class
        does not take them over.
      force_zeros: zeros replace the text states of an empty negative prompt (SDXL).
    """

    pipeline: str
    configs: dict[str, Config]
    tokenizers: dict[str, str]
    scheduler: dict[str, Any]
    force_zeros: bool


def read_folder(folder: Path) -> Described:
    """Reads the JSON files of a folder.

    Raises:
      PSAError: a missing file, or an unsupported class or value.
    """
    index = read_json(folder / "model_index.json")
    pipeline = pipeline_of(index, folder)
    names = ["text_encoder", *(["text_encoder_2"] if pipeline == SDXL else []), "vae", "unet"]
    classes = {name: (MODELS[name].library, (MODELS[name].class_name,)) for name in names}
    classes |= dict.fromkeys(PIPELINES[pipeline].values(), ("transformers", TOKENIZERS))
    classes["scheduler"] = "diffusers", ()
    listed = {name: _entry(folder, index, name, pipeline, *expected) for name, expected in classes.items()}
    files = {name: folder / name / "config.json" for name in names}
    configs = {name: read_config(name, file) for name, file in files.items()}
    scheduler = _scheduler(folder, listed["scheduler"])
    if pipeline == SD:
        configs["unet"] = _at_least_64(configs["unet"], files["unet"])
        scheduler = _corrected(scheduler)
    return Described(
        pipeline=pipeline,
        configs=configs,
        tokenizers={name: listed[name] for name in PIPELINES[pipeline].values()},
        scheduler=scheduler,
        force_zeros=pipeline == SDXL and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def pipeline_of(index: Mapping[str, Any], folder: Path) -> str:
    """Pipeline SD or SDXL of a `model_index.json`: by its class, or for a custom class ([module, class]) by its parts.

    Raises:
      PSAError: another class.
    """
    wanted = index.get("_class_name")
    if isinstance(wanted, list):
        second = index.get("text_encoder_2")
        return SDXL if isinstance(second, list) and second and second[0] is not None else SD
    for pipeline, classes in CLASSES.items():
        if wanted in classes:
            return pipeline
    raise PSAError(
        f"{folder}: pipeline class {wanted!r} is not supported (only {', '.join(PIPELINES)}); if the parts are of one "
        "of these, name it as _class_name in model_index.json"
    )


def _entry(
    folder: Path, index: Mapping[str, Any], name: str, pipeline: str, library: str, known: tuple[str, ...]
) -> str:
    """Class of a part. `known` lists the supported classes; empty for any. Other entries of the index are ignored."""
    entry = index.get(name)
    if entry is None or (isinstance(entry, list) and entry and entry[0] is None):
        raise PSAError(f"{folder}: model_index.json lists no {name}, which a {pipeline} needs")
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(each, str) for each in entry):
        raise PSAError(f"{folder}: model_index.json has {entry!r} as {name}; expected [library, class]")
    if known and entry[1] not in known:
        raise PSAError(f"{folder}: {name} is of class {entry[1]!r}, not supported (only {known[0]})")
    if entry[0] != library:
        raise PSAError(f"{folder}: {name} is of the library {entry[0]!r}, whose code is not run (only {library})")
    return entry[1]


def _scheduler(folder: Path, class_name: str) -> dict[str, Any]:
    config = read_scheduler(folder)
    defaults = config.pop("_use_default_values", [])  # bookkeeping of a live config: diffusers ignores these keys
    if not isinstance(defaults, list):
        raise PSAError(f"{folder}: scheduler: _use_default_values must be a list of keys, not {defaults!r}; remove it")
    return {key: value for key, value in config.items() if key not in defaults} | {"_class_name": class_name}


def _corrected(scheduler: dict[str, Any]) -> dict[str, Any]:
    """Scheduler config with the corrections of StableDiffusionPipeline. StableDiffusionXLPipeline makes none.

    Source: diffusers, `StableDiffusionPipeline.__init__`.
    """
    corrections: dict[str, Any] = {"steps_offset": 1}
    if isinstance(scheduler.get("clip_sample", True), bool | None):
        corrections["clip_sample"] = False
    absent = [key for key in corrections if key not in scheduler]
    return scheduler | corrections | ({"_use_default_values": absent} if absent else {})


def _at_least_64(unet: UNetConfig, file: Path) -> UNetConfig:
    """UNet config as StableDiffusionPipeline corrects it: before diffusers 0.9.0, a size below 64 means 64."""
    written = read_json(file).get("_diffusers_version", "0.9.0")
    version = re.match(r"\s*v?(\d+)(?:\.(\d+))?", str(written))
    if version is None:
        raise PSAError(f"{file}: _diffusers_version {written!r} is no version; remove it")
    old = (int(version[1]), int(version[2] or 0)) < (0, 9)
    small = isinstance(unet.sample_size, int) and unet.sample_size < 64
    return dataclasses.replace(unet, sample_size=64) if old and small else unet
