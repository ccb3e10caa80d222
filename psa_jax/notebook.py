"""Training in a notebook: data to shards, a configuration, a run and its curves.

    psa_jax.build("pairs", "shards", model="tiny")
    config = psa_jax.config("tiny:dpo", {"data.shards": "shards", "data.table": "table.safetensors", "steps": 200})
    adapter = psa_jax.train(config, "runs/own")
    loss = psa_jax.curves("runs/own")["loss"]

`psa_jax` itself offers what is here; the commands `build`, `train` and `curves` are the same for a shell.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import ml_collections

from psa_jax.data.model_shards import build_for_model
from psa_jax.errors import PSAError
from psa_jax.evaluation.curves import Curve, curves_of, read_rows
from psa_jax.interop.base_model import EMBEDDED, BaseModel
from psa_jax.mini.prepare import with_mini
from psa_jax.tools.configs import read_config
from psa_jax.training.loop import train as train_from_shards
from psa_jax.training.settings import validate


def build(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str | PathLike[str] = EMBEDDED,
    resolution: int | None = None,
    flips: bool = False,
    text: bool = False,
    batch_size: int = 16,
) -> Path:
    """Encodes preference pairs for a base model.

    Args:
      folder: in SAGE's layout, or with pairs of one's own.
      out: new folder for the shards.
      model: the base model, as for `psa_jax.load`.
      resolution: side of the pictures, in pixels; None for the model's own.
      flips: also store every picture mirrored.
      text: also store the outputs of the text encoders.
      batch_size: pictures that are encoded together.

    Returns:
      `out`.

    Raises:
      PSAError: a bad row or picture, a model that is not there, or an `out` that holds something else.
    """
    source = BaseModel(str(model))
    source.check()
    loaded = source.load()
    return build_for_model(
        loaded,
        Path(folder),
        Path(out),
        resolution=resolution or loaded.square_side,
        family="tiny" if str(model) == EMBEDDED else loaded.family,
        flips=flips,
        text=text,
        batch_size=batch_size,
    )


def config(name: str, values: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """A configuration of training, locked.

    Args:
      name: a shipped one with its mode, such as "tiny:dpo" or "sd15", or the path of a file.
      values: key → value, such as {"optimizer.learning_rate": 1e-4}.

    Raises:
      PSAError: an unknown name or key, or a value of another type.
    """
    return read_config(name, [(key, str(value)) for key, value in (values or {}).items()])


def train(config: ml_collections.ConfigDict, workdir: str | PathLike[str]) -> Path:
    """Trains an adapter, or goes on with a run that was stopped.

    Args:
      config: as `config` gives it.
      workdir: the run's folder.

    Returns:
      The adapter's file.

    Raises:
      PSAError: a setting or data that cannot be used, or a run that does not learn.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise PSAError(f"config is {type(config).__name__}; give what psa_jax.config(...) returns")
    validate(config, "train", Path(workdir))
    return train_from_shards(with_mini(config, Path(workdir) / "data"), Path(workdir))


def curves(workdir: str | PathLike[str]) -> dict[str, Curve]:
    """What a run has measured: metric → {"step": …, "value": …}, two lists of one length.

    Args:
      workdir: the run's folder; the run may still go on.

    Raises:
      PSAError: no run there.
    """
    return curves_of(read_rows(Path(workdir) / "metrics.jsonl"))
