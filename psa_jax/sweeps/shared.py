"""What the points of a sweep have in common, made once: SAGE-mini with its shards, and the reference's errors."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from psa_jax.files import write
from psa_jax.interop.base_model import BaseModel
from psa_jax.mini.prepare import with_mini
from psa_jax.progress import print_stage
from psa_jax.training.reference import reference_table
from psa_jax.training.run import prepare_run

SHARED = "shared"
"""Folder in that of a sweep."""


def shared_overrides(config: ml_collections.ConfigDict, workdir: Path) -> list[tuple[str, str]]:
    """What a point changes in its configuration to use what others use, too.

    Args:
      config: of the point, without these.
      workdir: of the sweep.

    Returns:
      Keys and their values, as text.
    """
    found = []
    if _draws_mini(config):
        data = _data_folder(config, workdir)
        found = [("data.shards", str(data / "shards")), ("data.table", str(data / "table.safetensors"))]
    if config.reference.draws and not config.reference.folder:
        found.append(("reference.folder", str(workdir / SHARED / "reference")))
    return found


def missing(
    configs: Sequence[ml_collections.ConfigDict], workdir: Path, *, reference: bool
) -> list[ml_collections.ConfigDict]:
    """One configuration for each shared thing that is not there yet.

    Args:
      configs: of the points, without `shared_overrides`.
      workdir: of the sweep.
      reference: whether errors of the reference count; else only data.
    """
    wanted = {}
    for config in configs:
        data = _data_folder(config, workdir)
        if _draws_mini(config) and not ((data / "shards").exists() and (data / "table.safetensors").exists()):
            wanted.setdefault(data, config)
        if reference and config.reference.draws and not _marker(config, workdir).exists():
            wanted.setdefault(_marker(config, workdir), config)
    return list(wanted.values())


def prepare(
    config: ml_collections.ConfigDict,
    read: Callable[[], ml_collections.ConfigDict],
    workdir: Path,
    *,
    reference: bool,
) -> None:
    """Makes what a point shares with others; what is there already is kept.

    Args:
      config: of the point, without `shared_overrides`.
      read: gives the same with them, once the data are there.
      workdir: of the sweep.
      reference: also compute the reference's errors, on the devices of this process.

    Raises:
      PSAError: a base model or data that cannot be used.
    """
    if _draws_mini(config):
        with_mini(_with_held_out(config), _data_folder(config, workdir))
    if reference and config.reference.draws and not _marker(config, workdir).exists():
        point = read()
        run = prepare_run(point, workdir / SHARED)
        print_stage(f"the reference's errors on {config.reference.draws} draws of each row")
        reference_table(
            run.setup,
            run.frozen,
            run.shared,
            run.shards,
            run.table,
            Path(point.reference.folder),
            batch_size=point.batch_size // point.accumulate,
            between=lambda: None,
        )
        write(_marker(config, workdir), "")


def _draws_mini(config: ml_collections.ConfigDict) -> bool:
    """As `with_mini` decides it."""
    return bool(config.data.mini.users) and not config.data.shards and not config.data.table


def _with_held_out(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with held-out measurements, for which there are shards of the validation split."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.validate.every = 1
    return changed


def _data_folder(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    mini, model = config.data.mini, BaseModel.from_config(config)
    return workdir / SHARED / f"mini-{mini.users}-{mini.seed}-{_digest([model.model, model.extra_parts])}"


def _marker(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Of the reference's errors that a configuration needs: they are complete where this file is."""
    model, objective = BaseModel.from_config(config), config.objective
    data = str(_data_folder(config, workdir)) if _draws_mini(config) else config.data.shards
    needs = [
        [model.model, model.extra_parts, config.dtype, data, config.batch_size // config.accumulate],
        [config.reference.draws, config.reference.seed],
        [objective.get(name) for name in ("timestep_low", "timestep_high", "text_dropout")],
    ]
    return Path(config.reference.folder or workdir / SHARED / "reference") / f"{_digest(needs)}.complete"


def _digest(of: list) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
