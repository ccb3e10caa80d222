"""The TFDS builder `sage`: a SAGE folder to ArrayRecord shards with cached VAE moments, and the way back.

A folder of shards:

    fingerprint.json             what the moments depend on, the settings, the rows of each split, the size of each file
    rows-<split>.json            user, category, prompt kind and ban of every row, for balancing without reading moments
    sage/<family>_<resolution>/1.0.0/   the TFDS data set, rows in the order of metadata.jsonl

No profile attributes are in it, but what a user bans tells about them: the folder is made for its owner alone (0700).
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, Int32
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.proto import tf_example_pb2

from psa_jax.data.images import open_image
from psa_jax.data.latents import Preprocess, encode_images
from psa_jax.data.sage import SPLITS, SageRecord, image_path, read_split
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES

FORMAT = "psa_jax.shards/1"
VERSION = "1.0.0"
KINDS = ("safe", "unsafe")
"""Prompt kinds; their position is the number in the shards (1 = unsafe prompt)."""

_INFO_FILE = "fingerprint.json"
_INFO_FIELDS = {
    "format",
    "fingerprint",
    "family",
    "resolution",
    "latent_shape",
    "preprocess",
    "tokens",
    "splits",
    "files",
}

Tokenizer = Callable[[list[str]], Int[np.ndarray, "n t"]]
"""Captions to token ids, padded to one length."""


def padded(tokenizer: Any) -> Tokenizer:
    """A transformers tokenizer as a `Tokenizer`: padded and cut to its `model_max_length`."""

    def tokenize(captions: list[str]) -> Int[np.ndarray, "n t"]:
        length = tokenizer.model_max_length
        return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="np")[
            "input_ids"
        ]

    return tokenize


@dataclass(eq=False, kw_only=True)
class SageConfig(tfds.core.BuilderConfig):
    """One (family, resolution).

    Args:
      family: model family, such as "sd1" or "tiny".
      resolution: side of the pictures, in pixels.
      latent_shape: (h, w, 2c) of the moments.
      tokens: prompt length of each tokenizer.
    """

    family: str
    resolution: int
    latent_shape: tuple[int, int, int]
    tokens: tuple[int, ...]


class Sage(tfds.core.GeneratorBasedBuilder):
    """SAGE with cached VAE moments. `build_shards` makes it; `tfds.builder_from_directory` and `tfds.load` read it.

    Args:
      examples: split -> its rows, in order, each a dict of the features below; only for making shards.
    """

    VERSION = tfds.core.Version(VERSION)
    # TFDS looks beside this file for checksums of downloads, with a package that it does not require; there are none.
    code_path = None

    def __init__(self, *, examples: Mapping[str, Iterable[dict[str, Any]]] | None = None, **kwargs: Any) -> None:
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        if not isinstance(config, SageConfig):
            raise PSAError("sage: no shards of this configuration in the data folder; make them with build_shards")
        # Left to itself, TFDS without TensorFlow writes float16 number by number: ten times slower, the same size.
        moments = tfds.features.Tensor(shape=config.latent_shape, dtype=np.float16, encoding="bytes")
        features = {
            "file_name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "category": tfds.features.ClassLabel(names=CATEGORIES),
            "kind": tfds.features.ClassLabel(names=KINDS),
            "banned": tfds.features.Scalar(np.bool_),
            "user_id": tfds.features.Text(),
            "moments_chosen": moments,
            "moments_rejected": moments,
            "original_size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            "crop": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            **{
                name: tfds.features.Tensor(shape=(length,), dtype=np.int32)
                for name, length in zip(_token_names(len(config.tokens)), config.tokens, strict=True)
            },
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="SAGE: prompts with a chosen and a rejected picture, as VAE moments (mean, log-variance).",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # row i of the shards is row i of metadata.jsonl
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # SAGE is given as a folder
        if self._examples is None:
            raise PSAError("sage: there is nothing to download; make shards with build_shards")
        return {split: self._generate_examples(rows) for split, rows in self._examples.items()}

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict]]:
        return iter(enumerate(rows))

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return _SortedExampleWriter(file_format=self.info.file_format)


class _SortedExampleWriter(tfds_writer.ExampleWriter):
    """Writes every record with its features in order of their names: the same rows give the same bytes.

    Protocol buffers put the entries of a map in an order that differs from process to process.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, _sorted_example(record)) for key, record in examples))


def _sorted_example(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


@dataclass(frozen=True, eq=False)
class RowColumns:
    """What balancing needs to know of every row.

    Args:
      user_ids: seven digits each.
      categories: position in CATEGORIES.
      unsafe: whether the prompt is the unsafe one.
      banned: whether the user bans the category.
    """

    user_ids: Sequence[str]
    categories: Int32[np.ndarray, " n"]
    unsafe: Bool[np.ndarray, " n"]
    banned: Bool[np.ndarray, " n"]


@dataclass(frozen=True, eq=False, repr=False)
class Shards:
    """One split of a shard folder, by random access: `shards[i]` is row i of metadata.jsonl as a dict of arrays.

    Args:
      source: the TFDS data source behind it.
      columns: facts about all rows, in memory.
      info: the contents of fingerprint.json.
    """

    source: Any
    columns: RowColumns
    info: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.source[row]

    def __repr__(self) -> str:
        return f"Shards({self.info['family']}_{self.info['resolution']}, {len(self)} rows)"


def build_shards(
    sage_dir: Path,
    out: Path,
    *,
    encode: Callable[..., Any],
    vae_fingerprint: str,
    latent_shape: tuple[int, int, int],
    tokenizer: Tokenizer | Sequence[Tokenizer],
    resolution: int,
    family: str,
    splits: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 16,
    max_pixels: int | None = None,
) -> Path:
    """Makes shards of a SAGE folder; every distinct picture is encoded once. The same input gives the same bytes.

    The folder appears complete or not at all.

    Args:
      sage_dir: folder in SAGE's layout.
      out: folder to make; absent or empty.
      encode: pictures [b, r, r, 3] in [-1, 1] → moments [b, h, w, 2c]; always called with `batch_size` pictures.
      vae_fingerprint: `latents.fingerprint` of the VAE behind `encode` and of the preprocessing.
      latent_shape: (h, w, 2c).
      tokenizer: one, or one for each text encoder (`input_ids`, `input_ids_2`, …).
      resolution: side r of the pictures, in pixels.
      family: model family, such as "tiny".
      splits: which; None takes those that the folder has.
      preprocess: None means `Preprocess(resolution)`.
      batch_size: pictures a call of `encode`.
      max_pixels: size limit of a picture; None means that of `open_image`.

    Returns:
      `out`.

    Raises:
      PSAError: `out` is not empty, or anything in the SAGE folder does not hold.
    """
    sage_dir, out = Path(sage_dir), Path(out)
    preprocess = preprocess or Preprocess(resolution)
    if preprocess.resolution != resolution:
        raise PSAError(f"preprocessing is for {preprocess.resolution} px, the shards for {resolution} px; use one")
    if not re.fullmatch("[a-z0-9]+", family):
        raise PSAError(f"family is {family!r}; it names a folder: use lower-case letters and digits")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PSAError(f"{out}: not an empty folder; give a new one or remove it first")
    tokenizers = (tokenizer,) if callable(tokenizer) else tuple(tokenizer)
    if splits is None:
        splits = [split for split in SPLITS if (sage_dir / split).is_dir()]
    if not splits:
        raise PSAError(f"{sage_dir}: none of the folders {', '.join(SPLITS)} is there; give a folder in SAGE's layout")
    # All metadata is read before the first picture is encoded: errors come in seconds, not hours.
    records = {split: read_split(sage_dir, split) for split in splits}
    tokens = {split: [_tokenize(each, rows) for each in tokenizers] for split, rows in records.items()}
    lengths = tuple(ids.shape[1] for ids in tokens[splits[0]])
    open_options = {} if max_pixels is None else {"max_pixels": max_pixels}

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:

        def rows_of(split: str) -> Iterator[dict[str, Any]]:
            load = _Loader(sage_dir, split, preprocess, open_options)
            # On disk, not in memory: at full size the moments of a split take gigabytes.
            moments, position = _encode_split(records[split], load, encode, batch_size, latent_shape, work / "moments")
            for index, record in enumerate(records[split]):
                ids = dict(zip(_token_names(len(lengths)), (each[index] for each in tokens[split]), strict=True))
                yield _example(record, load, moments, position) | ids
            del moments
            (work / "moments").unlink()

        config = SageConfig(
            name=f"{family}_{resolution}",
            family=family,
            resolution=resolution,
            latent_shape=tuple(latent_shape),
            tokens=lengths,
        )
        examples = {split: rows_of(split) for split in splits}
        builder = Sage(examples=examples, config=config, data_dir=work, file_format="array_record")
        # TFDS prints to stdout, which belongs to the caller's results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
        shutil.rmtree(work / "downloads", ignore_errors=True)
        for split, rows in records.items():
            (work / _columns_file(split)).write_text(json.dumps(_columns_json(rows)) + "\n")
        info = {
            "format": FORMAT,
            "fingerprint": vae_fingerprint,
            "family": family,
            "resolution": resolution,
            "latent_shape": list(latent_shape),
            "preprocess": asdict(preprocess),
            "tokens": list(lengths),
            "splits": {split: len(rows) for split, rows in records.items()},
            "files": {name: (work / name).stat().st_size for name in _files(work)},
        }
        (work / _INFO_FILE).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work)
        raise
    return out


def open_shards(out: Path, split: str, expect_fingerprint: str | None = None) -> Shards:
    """One split of what `build_shards` made.

    Args:
      out: the folder.
      split: its name.
      expect_fingerprint: `latents.fingerprint` of the VAE and the preprocessing in use; None skips the check.

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
    for name, size in info["files"].items():  # TFDS would notice a cut file only when it reads the missing rows
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise PSAError(f"{out / name}: missing or not of {size} bytes; copy it again or build the shards again")
    columns = _read_columns(out / _columns_file(split), info["splits"][split])
    folder = out / "sage" / f"{info['family']}_{info['resolution']}" / VERSION
    try:
        source = tfds.builder_from_directory(folder).as_data_source(split=split)
        rows = len(source)
    except (OSError, RuntimeError, ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise PSAError(f"{folder}: shards cannot be opened ({_first_line(error)}); build them again") from error
    if rows != info["splits"][split]:
        raise PSAError(f"{folder}: {rows} rows in {split}, expected {info['splits'][split]}; build the shards again")
    return Shards(source, columns, info)


def read_info(out: Path) -> dict[str, Any]:
    """Contents of fingerprint.json of a shard folder.

    Raises:
      PSAError: missing, damaged or of another format.
    """
    path = Path(out) / _INFO_FILE
    info = _read_json(path)
    if not isinstance(info, dict) or info.keys() != _INFO_FIELDS or info["format"] != FORMAT:
        raise PSAError(f"{path}: not the description of psa_jax shards ({FORMAT}); build the shards again")
    if not re.fullmatch(r"[a-z0-9]+_[0-9]+", f"{info['family']}_{info['resolution']}"):  # it becomes a path
        raise PSAError(f"{path}: family or resolution is no plain name; build the shards again")
    return info


@dataclass(frozen=True)
class _Loader:
    """Opens and prepares pictures of one split."""

    root: Path
    split: str
    preprocess: Preprocess
    options: Mapping[str, int]

    def __call__(self, name: str) -> Any:
        return self.preprocess(open_image(image_path(self.root, self.split, name), **self.options))


def _encode_split(
    records: Sequence[SageRecord],
    load: _Loader,
    encode: Callable[..., Any],
    batch_size: int,
    latent_shape: tuple[int, int, int],
    path: Path,
) -> tuple[Any, dict[str, Any]]:
    """Moments of every distinct picture, in a file, with the row and the geometry of each by its name."""
    # A pair is listed under two prompts: each picture occurs twice.
    names = list(dict.fromkeys(name for record in records for name in (record.safe_image, record.unsafe_image)))
    geometry = {}

    def pixels() -> Iterator[np.ndarray]:
        for name in names:
            image, *geometry[name] = load(name)
            yield image

    moments = np.memmap(path, dtype=np.float16, mode="w+", shape=(len(names), *latent_shape))
    for index, row in enumerate(encode_images(encode, pixels(), batch_size)):
        if row.shape != tuple(latent_shape):
            raise PSAError(f"encoder gave moments of shape {row.shape}, expected {tuple(latent_shape)}; check the VAE")
        moments[index] = row
    return moments, {name: (index, *geometry[name]) for index, name in enumerate(names)}


def _example(record: SageRecord, load: _Loader, moments: Any, position: Mapping[str, Any]) -> dict[str, Any]:
    chosen, *geometry = position[record.chosen]
    rejected, *rejected_geometry = position[record.rejected]
    if geometry != rejected_geometry:
        raise PSAError(
            f"{load.root / load.split}: {record.chosen} and {record.rejected} differ in size, so they cannot get the "
            "same crop; give both one size or remove their rows"
        )
    original_size, crop = geometry
    return {
        "file_name": record.file_name,
        "caption": record.caption,
        "category": record.category,
        "kind": KINDS[record.kind == "u"],
        "banned": record.banned,
        "user_id": record.user_id,
        "moments_chosen": moments[chosen],
        "moments_rejected": moments[rejected],
        "original_size": np.asarray(original_size, np.int32),
        "crop": np.asarray(crop, np.int32),
    }


def _token_names(count: int) -> tuple[str, ...]:
    return ("input_ids", *(f"input_ids_{number}" for number in range(2, count + 1)))


def _tokenize(tokenizer: Tokenizer, records: Sequence[SageRecord]) -> Int32[np.ndarray, "n t"]:
    ids = np.asarray(tokenizer([record.caption for record in records]))
    if ids.ndim != 2 or len(ids) != len(records) or not np.issubdtype(ids.dtype, np.integer):
        raise PSAError(f"tokenizer gave {ids.dtype} {ids.shape} for {len(records)} captions; expected integers [n, t]")
    return ids.astype(np.int32)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _columns_file(split: str) -> str:
    return f"rows-{split}.json"


def _columns_json(records: Sequence[SageRecord]) -> dict[str, list]:
    return {
        "user_id": [record.user_id for record in records],
        "category": [CATEGORIES.index(record.category) for record in records],
        "unsafe": [int(record.kind == "u") for record in records],
        "banned": [int(record.banned) for record in records],
    }


def _read_columns(path: Path, rows: int) -> RowColumns:
    columns = _read_json(path)
    names = ("user_id", "category", "unsafe", "banned")
    if (
        not isinstance(columns, dict)
        or tuple(columns) != names
        or not all(isinstance(columns[name], list) and len(columns[name]) == rows for name in names)
        or not all(isinstance(user_id, str) for user_id in columns["user_id"])
        or not all(value in range(len(CATEGORIES)) for value in columns["category"])
        or not all(value in (0, 1) for name in ("unsafe", "banned") for value in columns[name])
    ):
        raise PSAError(f"{path}: does not describe the {rows} rows of this split; build the shards again")
    return RowColumns(
        columns["user_id"],
        np.asarray(columns["category"], np.int32),
        np.asarray(columns["unsafe"], np.bool_),
        np.asarray(columns["banned"], np.bool_),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PSAError(f"{path}: cannot be read ({_first_line(error)}); give a folder of complete shards") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
