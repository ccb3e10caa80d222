"""What the folder of a point says of its training: whether it has ended, and whether it is the one wanted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import ADAPTER_FILE, read_metadata
from psa_jax.json_input import read_json
from psa_jax.rules import quoted

DONE, DIVERGED, BEGUN, NEW = "done", "diverged", "begun", "new"
"""States of a point. Diverged: its loss, gradient or update was not finite, as it would be again."""
CONFIG_FILE = "config.json"

SHARED_KEYS = ("data.shards", "data.table", "reference.folder")
"""Paths that a sweep fills in where a configuration leaves them empty."""


def state_of(folder: Path, config: ml_collections.ConfigDict) -> str:
    """The state of a point, by what `psa-jax train` leaves in its folder.

    Args:
      folder: of the point.
      config: as the point would be trained with.

    Raises:
      PSAError: the folder holds a run of another configuration.
    """
    if (folder / CONFIG_FILE).is_file():
        _require_same(folder, config)
    adapter = folder / ADAPTER_FILE
    if adapter.is_file() and (folder / CONFIG_FILE).is_file():
        steps = read_metadata(adapter).get("steps")
        if steps == config.steps:
            return DONE
    if any(folder.glob("nonfinite_*.json")):
        return DIVERGED
    return BEGUN if latest_checkpoint(folder) or (folder / CONFIG_FILE).is_file() else NEW


def latest_checkpoint(folder: Path) -> int:
    """The step of the latest checkpoint of a run; 0 for none."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _require_same(folder: Path, config: ml_collections.ConfigDict) -> None:
    found, wanted = (_flat(each) for each in (read_json(folder / CONFIG_FILE), json.loads(_json(config))))
    different = sorted(
        key for key in found | wanted if found.get(key) != wanted.get(key) and not _filled_in(key, wanted.get(key))
    )
    if different:
        words = ", ".join(
            f"{key} {quoted(found.get(key), 40)} and not {quoted(wanted.get(key), 40)}" for key in different[:3]
        )
        more = f" and {len(different) - 3} more" if different[3:] else ""
        raise PSAError(
            f"{folder}: holds a run of another configuration, {words}{more}; give another --workdir, or "
            "delete this folder"
        )


def _filled_in(key: str, wanted: Any) -> bool:
    """Whether a key is a path that the sweep fills in later: it may then be any."""
    return key in SHARED_KEYS and not wanted


def _json(config: ml_collections.ConfigDict) -> str:
    return config.to_json_best_effort()


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat
