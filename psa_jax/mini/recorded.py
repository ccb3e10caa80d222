"""Recorded verdicts of the comparison adapters, which `psa-jax demo` quotes instead of training them again.

A recording holds a verdict for every case, so that rates and win rates are computed and not quoted, and the recipe that
made it. It is used only where the recipe and the cases are those of the run at hand.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.files import write
from psa_jax.interop.base_model import BaseModel
from psa_jax.json_input import read_json
from psa_jax.mini.protocol import MiniCase, cases_hash
from psa_jax.models.adapter_config import ADDED_SIZES
from psa_jax.preference import objective
from psa_jax.renamed import renamed_keys

COMPARED = ("user_blind", "published_t1")
"""The comparison adapters."""
ASSETS = Path(__file__).parents[1] / "assets"
BASE_MODEL_METRICS, COMPARISON_VERDICTS = ASSETS / "base_model_metrics.json", ASSETS / "comparison_verdicts.json"
COMMAND = "psa-jax demo --workdir=runs/demo --compare"
"""Makes the recording, with --record=FILE."""

_GROUPS = ("seed", "model", "steps", "batch_size", "adapter", "objective", "optimizer", "data", "evaluate")
_OPTIONAL: dict[str, dict[str, Any]] = {
    "adapter": {"qk_dim": None, **ADDED_SIZES},
    "optimizer": {"ema": 0.0},
    "data": {"shards": "", "table": "", "banned_share": 0.5},
    "reference": {"draws": 0, "seed": 0},
}
"""For each group, the keys that a recipe may lack and the values that these then have.

A new key of a configuration belongs here, with the value that changes nothing: recordings from before it stay in use.
"""


def recipe_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Collects what two runs must share to be compared: configuration, embedded base model and oracle.

    Returns:
      JSON values.
    """
    whole = json.loads(config.to_json_best_effort())
    recipe = {name: whole[name] for name in _GROUPS} | BaseModel.from_config(config).extra_parts
    del recipe["evaluate"]["batch_size"]  # a picture does not depend on the batch that it was generated in
    recipe["reference"] = {name: whole["reference"][name] for name in ("draws", "seed")}
    return recipe | {"assets": json.loads(BASE_MODEL_METRICS.read_text(encoding="utf-8"))["sha256"]}


def same_recipe(recorded: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether two recipes differ from the defaults in the same way: a key that one of them lacks has its default."""
    return _completed(recorded) == _completed(recipe)


def _completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _OPTIONAL | {"objective": dataclasses.asdict(objective.Objective())}
    recipe = renamed_keys(recipe)
    return recipe | {group: values | recipe.get(group, {}) for group, values in defaults.items()}


def read_recording(path: Path = COMPARISON_VERDICTS) -> dict[str, Any]:
    """Reads a recording.

    Raises:
      PSAError: the file is missing or is no JSON object.
    """
    return read_json(path, hint=f"run {COMMAND}")


def write_recording(path: Path, recipe: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what `read_recording` reads.

    Args:
      recipe: that of `recipe_of`.
      places: for each group of users, what `pack_place` makes.
    """
    kept = {place: {name: packed[name] for name in ("cases", *COMPARED)} for place, packed in places.items()}
    write(path, json.dumps({"command": COMMAND, "recipe": recipe} | kept, indent=1) + "\n")


def pack_place(cases: Sequence[MiniCase], verdicts: Mapping[str, Verdicts]) -> dict[str, Any]:
    """Packs the verdicts of all methods on the cases of one group of users as JSON values."""
    return {"cases": cases_hash(cases), **{name: pack_verdicts(verdict) for name, verdict in verdicts.items()}}


def recorded_verdicts(place: Mapping[str, Any], cases: Sequence[MiniCase]) -> dict[str, Verdicts]:
    """Unpacks the verdicts of the comparison adapters on these cases.

    Raises:
      PSAError: the recording judged other cases.
    """
    if place["cases"] != cases_hash(cases):
        raise PSAError(f"the recorded runs judged other cases than this configuration; run {COMMAND}")
    return {name: unpack_verdicts(place[name]) for name in COMPARED}


def pack_verdicts(verdicts: Verdicts) -> dict[str, str]:
    """The bits of the oracle's verdicts as text."""
    bits = {name: values for name, values in dataclasses.asdict(verdicts).items() if values is not None}
    return {name: "".join("01"[int(value)] for value in values) for name, values in bits.items()}


def unpack_verdicts(bits: Mapping[str, str]) -> Verdicts:
    """What `pack_verdicts` packed."""
    return Verdicts(**{name: np.array([bit == "1" for bit in text]) for name, text in bits.items()})
