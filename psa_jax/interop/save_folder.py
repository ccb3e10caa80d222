"""Writer of folders in diffusers' layout, which diffusers' `from_pretrained` opens."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.files import replacing_folder
from psa_jax.interop.parts import MODELS, PIPELINES, SD, SDXL, Config, read_config, save_tokenizer
from psa_jax.interop.stable_diffusion import StableDiffusion
from psa_jax.interop.weights import save_weights
from psa_jax.json_input import read_json
from psa_jax.models.config import CLIPTextConfig, VAEConfig


def save_stable_diffusion(model: StableDiffusion, out: Path, dtype: Any | None = None) -> None:
    """Writes a pipeline as a folder in diffusers' layout, whole or not at all.

    JSON files are copied from `model.folder` if they exist there, so that keys unknown here survive a round trip.

    Args:
      model: the pipeline.
      out: a new or empty folder.
      dtype: of every tensor; None for the parameters' own.

    Raises:
      PSAError: the folder is not empty, or a value is not finite in `dtype`.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise PSAError(f"{out}: not an empty folder; give a new one")
    with replacing_folder(out) as unfinished:
        _write_parts(model, unfinished, dtype)


def _write_parts(model: StableDiffusion, out: Path, dtype: Any | None) -> None:
    pipeline = SDXL if model.family == "sdxl" else SD
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, format_ in MODELS.items():
        if (module := getattr(model, name)) is None:
            continue
        index[name] = [format_.library, format_.class_name]
        (out / name).mkdir(parents=True)
        save_weights(module, out / name / f"{format_.stem}.safetensors", format_.file_name, dtype=dtype)
        source = model.folder / name / "config.json"
        if source.is_file() and read_config(name, source) == module.config:
            shutil.copyfile(source, out / name / "config.json")
        else:
            _write_json(out / name / "config.json", config_json(format_.class_name, module.config))
    for name in PIPELINES[pipeline].values():
        index[name] = ["transformers", "CLIPTokenizer"]
        save_tokenizer(getattr(model, name), out / name)
    settings = dict(model.scheduler_config)
    for key in settings.pop("_use_default_values", ()):  # corrections that the pipeline makes on loading
        del settings[key]
    _write_json(out / "scheduler" / "scheduler_config.json", settings)
    source = model.folder / "model_index.json"
    index |= read_json(source) if source.is_file() else {}
    if isinstance(index["_class_name"], list):  # a custom class, whose code is not copied
        index["_class_name"] = pipeline
    if scheduler := model.scheduler_config.get("_class_name"):
        index["scheduler"] = ["diffusers", scheduler]
    # The source's safety checker is not written, so it must not be listed.
    index |= dict.fromkeys(["feature_extractor", "image_encoder"], [None, None])
    if pipeline == SD:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = model.force_zeros_for_empty_prompt
    _write_json(out / "model_index.json", index)


def config_json(class_name: str, config: Config) -> dict[str, Any]:
    """Content of a `config.json`.

    Args:
      class_name: of the model in diffusers or transformers.
      config: its configuration.
    """
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items() if v is not None}
    if isinstance(config, CLIPTextConfig):
        # transformers opens a model in this type, and without the key in the file's type.
        return {"architectures": [class_name], "model_type": "clip_text_model", "dtype": "float32", **values}
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        values["down_block_types"] = ["DownEncoderBlock2D"] * blocks
        values["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    return {"_class_name": class_name, **values}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
