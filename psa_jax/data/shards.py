"""Reads folders of shards: rows by number, with facts about all rows in memory. `build` makes them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, Int32

from psa_jax.data.preprocess import RESAMPLE, Preprocess
from psa_jax.data.rows import NO_CATEGORY
from psa_jax.errors import PSAError
from psa_jax.json_input import read_json
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.tensor_file import read_float32, read_header

FORMAT = "psa_jax.shards/3"
_FORMATS = re.compile(r"psa_jax\.shards/[0-9]+")
VERSION = "2.0.0"
INFO_FILE = "fingerprint.json"
EMPTY_PROMPT_FILE = "text-empty.safetensors"
_MAX_BYTES = 1 << 30  # 25 bytes a row
_INFO_FIELDS = {
    "format",
    "fingerprint",
    "inputs",
    "family",
    "resolution",
    "latent_shape",
    "preprocess",
    "flips",
    "tokens",
    "text",
    "splits",
    "unpaired",
    "pictures",
    "files",
}


@dataclass(frozen=True, eq=False)
class RowColumns:
    """Facts about every row, for balancing.

    Args:
      user_ids: seven digits each.
      categories: position in CATEGORIES, or NO_CATEGORY.
      unsafe: whether the prompt is the unsafe one.
      banned: whether the user bans what the prompt asks for.
      twins: whether the safe prompt of the row's pair is known.
    """

    user_ids: Sequence[str]
    categories: Int32[np.ndarray, " n"]
    unsafe: Bool[np.ndarray, " n"]
    banned: Bool[np.ndarray, " n"]
    twins: Bool[np.ndarray, " n"]


@dataclass(frozen=True, eq=False, repr=False)
class Shards:
    """One split of a folder of shards, by random access: `shards[i]` is row i of metadata.jsonl as a dict of arrays.

    Args:
      folder: the folder of all splits.
      split: the name of this one.
      source: the TFDS data source behind it.
      columns: facts about all rows, in memory.
      info: the contents of fingerprint.json.
    """

    folder: Path
    split: str
    source: Any
    columns: RowColumns
    info: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.source[row]

    def __repr__(self) -> str:
        return f"Shards({self.info['family']}_{self.info['resolution']}, {len(self)} rows)"


def open_shards(out: Path, split: str, expect_fingerprint: str | None = None) -> Shards:
    """Opens one split of what `build_shards` made.

    Args:
      out: the folder.
      split: its name.
      expect_fingerprint: `vae_fingerprint` of the VAE and the preprocessing in use; None skips the check.

    Raises:
      PSAError: no shards there, no such split, another fingerprint, or files that do not fit together.
    """
    out = Path(out)
    info = read_info(out)
    if expect_fingerprint is not None and info["fingerprint"] != expect_fingerprint:
        raise PSAError(
            f"{out}: shards have the fingerprint {info['fingerprint']}, the model in use {expect_fingerprint} "
            "(other VAE weights, resolution or preprocessing); build the shards again with this model"
        )
    if split not in info["splits"]:
        raise PSAError(f"{out}: no split {split!r} in the shards; they have {', '.join(sorted(info['splits']))}")
    for name, facts in info["files"].items():  # TFDS would notice a cut file only when it reads the missing rows
        if not (out / name).is_file() or (out / name).stat().st_size != facts["bytes"]:
            raise PSAError(
                f"{out / name}: missing or not of {facts['bytes']} bytes; copy it again or build the shards again"
            )
    columns = _read_columns(out / columns_file(split), info["splits"][split])
    folder = out / "sage" / f"{info['family']}_{info['resolution']}" / VERSION
    try:
        source = tfds.builder_from_directory(folder).as_data_source(split=split)
        rows = len(source)
    except (OSError, RuntimeError, ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise PSAError(f"{folder}: shards cannot be opened ({_first_line(error)}); build them again") from error
    if rows != info["splits"][split]:
        raise PSAError(f"{folder}: {rows} rows in {split}, expected {info['splits'][split]}; build the shards again")
    return Shards(out, split, source, columns, info)


def read_info(out: Path) -> dict[str, Any]:
    """Contents of fingerprint.json of a folder of shards.

    Raises:
      PSAError: missing, damaged or of another format.
    """
    path = Path(out) / INFO_FILE
    info = _read_json(path)
    made = info.get("format") if isinstance(info, dict) else None
    if isinstance(made, str) and _FORMATS.fullmatch(made) and made != FORMAT:
        raise PSAError(
            f"{path}: shards of {made}, this version reads {FORMAT}, which holds the safe prompt of each pair, too; "
            "build the shards again"
        )
    if info.keys() - {"text_fingerprint"} != _INFO_FIELDS or info["format"] != FORMAT or not _is_info(info):
        raise PSAError(f"{path}: not the description of psa_jax shards ({FORMAT}); build the shards again")
    if not re.fullmatch(r"[a-z0-9]+_[0-9]+", f"{info['family']}_{info['resolution']}"):  # it becomes a path
        raise PSAError(f"{path}: family or resolution is no plain name; build the shards again")
    return info


def _is_info(info: dict[str, Any]) -> bool:
    """Whether everything that is read has the right type."""

    def whole(*values: Any) -> bool:
        return all(type(value) is int and value >= 0 for value in values)

    splits, files, shape = info["splits"], info["files"], info["latent_shape"]
    return (
        isinstance(splits, dict)
        and whole(*splits.values(), info["resolution"])
        and isinstance(info["unpaired"], dict)
        and info["unpaired"].keys() == splits.keys()
        and whole(*info["unpaired"].values())
        and isinstance(files, dict)
        and all(isinstance(facts, dict) and whole(facts.get("bytes")) for facts in files.values())
        and isinstance(shape, list)
        and len(shape) == 3
        and whole(*shape)
        and all(isinstance(info[name], str) for name in ("fingerprint", "family"))
        and isinstance(info.get("text_fingerprint", ""), str)
        and _is_preprocess(info["preprocess"])
        and isinstance(info["flips"], bool)
    )


def preprocess_of(info: Mapping[str, Any]) -> Preprocess:
    """How the pictures in the shards were resized and cropped.

    Args:
      info: contents of fingerprint.json.
    """
    return Preprocess(**info["preprocess"])


def _is_preprocess(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"resolution", "resample"}:
        return False
    resolution, resample = value["resolution"], value["resample"]
    return type(resolution) is int and resolution > 0 and isinstance(resample, str) and resample in RESAMPLE


def read_empty_prompt(out: Path) -> dict[str, Float32[np.ndarray, "..."]] | None:
    """The text embeddings of the empty prompt: `text_states` [t, c] and, with two encoders, `text_pooled` [p].

    Args:
      out: folder of shards.

    Returns:
      float32 arrays by name; None if the shards lack them, as those without text embeddings and older ones do.

    Raises:
      PSAError: the file is damaged.
    """
    path = Path(out) / EMPTY_PROMPT_FILE
    if EMPTY_PROMPT_FILE not in read_info(out)["files"]:
        return None
    return {name: read_float32(path, name, entry) for name, entry in read_header(path).tensors.items()}


def columns_file(split: str) -> str:
    """Name of the file with the facts about the rows of a split."""
    return f"rows-{split}.json"


def _read_columns(path: Path, rows: int) -> RowColumns:
    columns = _read_json(path)
    names = ("user_id", "category", "unsafe", "banned", "twin")
    if (
        tuple(columns) != names
        or not all(isinstance(columns[name], list) and len(columns[name]) == rows for name in names)
        or not all(isinstance(user_id, str) for user_id in columns["user_id"])
        or not all(type(value) is int and value in range(NO_CATEGORY, len(CATEGORIES)) for value in columns["category"])
        or not all(type(value) is int and value in (0, 1) for name in names[2:] for value in columns[name])
    ):
        raise PSAError(f"{path}: does not describe the {rows} rows of this split; build the shards again")
    return RowColumns(
        columns["user_id"],
        np.asarray(columns["category"], np.int32),
        np.asarray(columns["unsafe"], np.bool_),
        np.asarray(columns["banned"], np.bool_),
        np.asarray(columns["twin"], np.bool_),
    )


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, limit=_MAX_BYTES)
    except PSAError as error:
        raise PSAError(f"{error}; give a folder of complete shards") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
