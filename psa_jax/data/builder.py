"""The TFDS builder `sage`: a SAGE folder to ArrayRecord shards with cached VAE moments.

A folder of shards:

    README.md                    the dataset card
    fingerprint.json             what the moments depend on, settings, rows of each split, size and hash of each file
    rows-<split>.json            user, category, prompt kind and ban of every row, for balancing without reading moments
    sage/<family>_<resolution>/1.0.0/   the TFDS data set, rows in the order of metadata.jsonl

No profile attributes are in it, but what a user bans tells about them: the folder is made for its owner alone (0700).
While it is made, `<name>.parts` beside it holds what is encoded already.
"""

import contextlib
import functools
import hashlib
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
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int, Int32
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.core.utils import tqdm_utils
from tensorflow_datasets.proto import tf_example_pb2

from psa_jax.data.chunks import Encoded, fill_chunks, plan_chunks
from psa_jax.data.dataset_card import dataset_card
from psa_jax.data.encoding import PictureEncoder, Pictures, TextCache, distinct_prompts, file_hash
from psa_jax.data.preprocess import Preprocess
from psa_jax.data.sage import METADATA, PROMPT_KINDS, SPLITS, SageRecord, read_split
from psa_jax.data.shards import FORMAT, INFO_FILE, VERSION, columns_file, read_info
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.progress import print_stage, track

_CHUNK_BATCHES = 16  # calls of the VAE that a kill can cost

Tokenizer = Callable[[list[str]], Int[np.ndarray, "n t"]]
"""Captions to token ids, padded to one length."""


@dataclass(eq=False, kw_only=True)
class SageConfig(tfds.core.BuilderConfig):
    """One (family, resolution).

    Args:
      family: model family, such as "sd1" or "tiny".
      resolution: side of the pictures, in pixels.
    """

    family: str
    resolution: int


class _EveryConfig(Mapping):
    """A configuration for every name such as sd1_512: TFDS looks names up here."""

    def __getitem__(self, name: str) -> SageConfig:
        match = re.fullmatch("([a-z0-9]+)_([0-9]+)", name)
        if match is None:
            raise KeyError(name)
        return _config(match[1], int(match[2]))

    def __iter__(self) -> Iterator[str]:
        return iter(())  # none is listed: which there are, the folder says

    def __len__(self) -> int:
        return 0


@functools.cache  # TFDS refuses two configurations of one name
def _config(family: str, resolution: int) -> SageConfig:
    return SageConfig(name=f"{family}_{resolution}", family=family, resolution=resolution)


class Sage(tfds.core.GeneratorBasedBuilder):
    """SAGE with cached VAE moments. `build_shards` makes it; `tfds.load` and `tfds.builder_from_directory` read it.

    Args:
      examples: split -> its rows, in order, each a dict of the features below; only for making shards.
      layout: with `examples`: latent_shape, tokens, flips and text as in fingerprint.json.
    """

    VERSION = tfds.core.Version(VERSION)
    builder_configs = _EveryConfig()
    # TFDS looks beside this file for checksums of downloads, with a package that it does not require; there are none.
    code_path = None

    def __init__(
        self,
        *,
        examples: Mapping[str, Iterable[dict[str, Any]]] | None = None,
        layout: Mapping[str, Any] | None = None,
        data_dir: Path | str | None = None,
        config: SageConfig | str | None = None,
        **kwargs: Any,
    ) -> None:
        if data_dir is None:
            raise PSAError("sage: give data_dir, the folder that psa-jax build has made")
        self._examples = examples
        self._layout = layout or read_info(Path(data_dir))
        config = config or _config(self._layout["family"], self._layout["resolution"])
        super().__init__(data_dir=data_dir, config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        def half(shape: Sequence[int]) -> tfds.features.Tensor:
            # Left to itself, TFDS without TensorFlow writes float16 number by number: ten times slower, the same size.
            return tfds.features.Tensor(shape=tuple(shape), dtype=np.float16, encoding="bytes")

        def integers(length: int) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=(length,), dtype=np.int32)

        tokens = self._layout["tokens"]
        features = {
            "file_name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "category": tfds.features.ClassLabel(names=CATEGORIES),
            "kind": tfds.features.ClassLabel(names=PROMPT_KINDS),
            "banned": tfds.features.Scalar(np.bool_),
            "user_id": tfds.features.Text(),
            **{name: half(self._layout["latent_shape"]) for name in _moment_names(self._layout["flips"])},
            **{name: half(shape) for name, shape in self._layout["text"].items()},
            "original_size": integers(2),
            "crop": integers(2),
            **{name: integers(length) for name, length in zip(_token_names(len(tokens)), tokens, strict=True)},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="SAGE: prompts with a chosen and a rejected picture, as VAE moments (mean, log-variance).",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # row i of the shards is row i of metadata.jsonl
        )

    def as_dataset(self, split: Any = None, *, decoders: Any = None, **options: Any) -> Any:
        """What `as_data_source` gives: rows by number. TFDS has no `tf.data` reader for ArrayRecord."""
        for name in ("batch_size", "shuffle_files", "as_supervised"):
            if options.get(name):
                raise PSAError(f"sage: {name} is for tf.data, which does not read these shards; leave it out")
        return self.as_data_source(split, decoders=decoders)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # SAGE is given as a folder
        if self._examples is None:
            raise PSAError("sage: there is nothing to download; make shards with build_shards")
        return {split: self._generate_examples(rows) for split, rows in self._examples.items()}

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict]]:
        return iter(enumerate(rows))

    # Nothing is downloaded, and the sizes that TFDS would name are not known: `build_shards` says what it does.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return _SortedExampleWriter(file_format=self.info.file_format)


class _SortedExampleWriter(tfds_writer.ExampleWriter):
    """Writes every record with its features in order of their names: the same rows give the same bytes.

    Protocol buffers put the entries of a map in an order that differs from process to process. Records are not
    compressed, which TFDS has no option for: moments are mostly noise, and decompressing takes half of a row's time.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for _, record in examples:
            writer.write(_sorted_example(record))
        writer.close()


def _sorted_example(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


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
    flips: bool = False,
    text: TextCache | None = None,
    batch_size: int = 16,
    max_pixels: int | None = None,
    threads: int | None = None,
    part: tuple[int, int] | None = None,
) -> Path:
    """Makes shards of a SAGE folder; every distinct picture is encoded once. The same input gives the same bytes.

    The folder appears complete or not at all. What is encoded is kept in `<out>.parts` until then: killed at any
    moment and called again, it goes on. Hosts that share that folder (or put theirs together) encode a `part` each;
    a last call without one encodes what is still missing and makes the shards.

    Args:
      sage_dir: folder in SAGE's layout.
      out: folder to make; absent, empty, or made by this very call before.
      encode: pictures [b, r, r, 3] in [-1, 1] → moments [b, h, w, 2c]; always called with `batch_size` pictures.
      vae_fingerprint: `latents.fingerprint` of the VAE behind `encode` and of the preprocessing.
      latent_shape: (h, w, 2c).
      tokenizer: one, or one for each text encoder (`input_ids`, `input_ids_2`, …).
      resolution: side r of the pictures, in pixels.
      family: model family, such as "tiny".
      splits: which; None takes those that the folder has.
      preprocess: None means `Preprocess(resolution)`.
      flips: encode the mirrored pictures, too.
      text: store text embeddings, too.
      batch_size: pictures a call of `encode`.
      max_pixels: size limit of a picture; None means that of `open_image`.
      threads: that decode pictures; None takes one a core.
      part: (i, n) encodes the i-th of n parts and makes no shards.

    Returns:
      `out`, or with `part` the folder of the work files.

    Raises:
      PSAError: `out` holds something else, or anything in the SAGE folder does not hold.
    """
    sage_dir, out = Path(sage_dir), Path(out)
    preprocess, threads = preprocess or Preprocess(resolution), threads or os.cpu_count() or 1
    if preprocess.resolution != resolution:
        raise PSAError(f"preprocessing is for {preprocess.resolution} px, the shards for {resolution} px; use one")
    if not re.fullmatch("[a-z0-9]+", family):
        raise PSAError(f"family is {family!r}; it names a folder: use lower-case letters and digits")
    if part is not None and not 0 <= part[0] < part[1]:
        raise PSAError(f"part {part[0]} of {part[1]} does not exist; count from 0")
    if batch_size < 1:
        raise PSAError(f"batch size for encoding is {batch_size}; give a number from 1 up")
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (out / INFO_FILE).is_file():
        raise PSAError(f"{out}: not an empty folder; give a new one or remove it first")
    if splits is None:
        splits = [split for split in SPLITS if (sage_dir / split).is_dir()]
    if not splits:
        raise PSAError(f"{sage_dir}: none of the folders {', '.join(SPLITS)} is there; give a folder in SAGE's layout")

    # --- everything but pixels is read before the first picture is encoded: errors come in seconds, not hours
    tokenizers = (tokenizer,) if callable(tokenizer) else tuple(tokenizer)
    records = {split: read_split(sage_dir, split) for split in splits}
    tokens = {split: [_tokenize(each, rows) for each in tokenizers] for split, rows in records.items()}
    lengths = tuple(ids.shape[1] for ids in tokens[splits[0]])
    # A pair is listed under two prompts: each picture occurs twice.
    names = {split: list(dict.fromkeys(_pictures_of(rows))) for split, rows in records.items()}
    pictures = Pictures.of(sage_dir, names, threads)
    settings = {"vae": vae_fingerprint, "preprocess": asdict(preprocess), "flips": flips, "batch_size": batch_size}
    hashes = {f"VAE and preprocessing ({resolution} px)": vae_fingerprint}
    hashes |= {f"{split}/{METADATA}": file_hash(sage_dir / split / METADATA) for split in splits}
    hashes["pictures, in order of first use"] = _hash(pictures.digests)
    hashes["token ids"] = _hash([[ids.tolist() for ids in each] for each in tokens.values()])
    if text is not None:
        hashes["text encoders"] = text.fingerprint
    inputs = _hash([FORMAT, settings, hashes, family, list(latent_shape)])
    work = out.with_name(f"{out.name}.parts")
    if occupied:
        if read_info(out)["inputs"] != inputs:
            raise PSAError(f"{out}: not an empty folder, but shards made otherwise; give a new one or remove it first")
        shutil.rmtree(work, ignore_errors=True)  # what a kill after the last step has left
        return out

    # --- encoding, into work files
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = {} if max_pixels is None else {"max_pixels": max_pixels}
    encoder = PictureEncoder(encode, tuple(latent_shape), preprocess, batch_size, flips, threads, options)
    size = batch_size * _CHUNK_BATCHES
    chunks = plan_chunks(work, settings, pictures.digests, size)
    print_stage(f"encoding pictures at {resolution} px, {batch_size} at a time; compiling comes first")
    fill = functools.partial(fill_chunks, part=part or (0, 1), batch=batch_size)
    fill(chunks, lambda todo: encoder([pictures.paths[n] for n in todo]), "picture")
    prompts, prompt_of, text_chunks = [], {}, []
    if text is not None:
        prompts, prompt_of = distinct_prompts(tokens)
        settings = {"text": text.fingerprint, "batch_size": batch_size}
        text_chunks = plan_chunks(work, settings, [_hash(ids.tolist()) for ids in prompts], size)
        fill(text_chunks, lambda todo: text([prompts[n] for n in todo], batch_size), "prompt")
    if part is not None:
        return work

    # --- shards
    moments, states = Encoded(chunks), Encoded(text_chunks) if text_chunks else None

    def rows_of(split: str) -> Iterator[dict[str, Any]]:
        for index, record in enumerate(track(records[split], len(records[split]), "row", f"writing {split}")):
            ids = dict(zip(_token_names(len(lengths)), (each[index] for each in tokens[split]), strict=True))
            cached = {} if states is None else states[prompt_of[split][index]]
            pair = [moments[pictures.number[split, name]] for name in (record.chosen, record.rejected)]
            yield _example(sage_dir / split, record, *pair) | ids | cached

    shapes = {} if states is None else {name: list(array.shape) for name, array in states[0].items()}
    info = {
        "format": FORMAT,
        "fingerprint": vae_fingerprint,
        "inputs": inputs,
        "family": family,
        "resolution": resolution,
        "latent_shape": list(latent_shape),
        "preprocess": asdict(preprocess),
        "flips": flips,
        "tokens": list(lengths),
        "text": shapes,
        "splits": {split: len(rows) for split, rows in records.items()},
        "pictures": len(pictures.paths),
    }
    made = Path(tempfile.mkdtemp(prefix="shards.", dir=work))
    try:
        examples = {split: rows_of(split) for split in splits}
        builder = Sage(examples=examples, layout=info, data_dir=made, file_format="array_record")
        # TFDS prints to stdout, which belongs to the caller's results.
        with contextlib.redirect_stdout(sys.stderr), _without_bars():
            builder.download_and_prepare(file_format="array_record")
        shutil.rmtree(made / "downloads", ignore_errors=True)
        for split, rows in records.items():
            (made / columns_file(split)).write_text(json.dumps(_columns_json(rows)) + "\n")
        counts = {split: _counts(rows, len(names[split])) for split, rows in records.items()}
        (made / "README.md").write_text(dataset_card(info, counts, hashes), encoding="utf-8")
        info["files"] = {name: _file_facts(made / name) for name in _files(made)}
        (made / INFO_FILE).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
    except BaseException:
        shutil.rmtree(made)
        raise
    os.rename(made, out)
    shutil.rmtree(work)
    return out


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """TFDS draws bars of its own, on one endless line in a log file. The setting is its user's, and is given back."""
    before = tqdm_utils._active
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.display_progress_bar(before)


def _pictures_of(records: Sequence[SageRecord]) -> Iterator[str]:
    for record in records:
        yield record.safe_image
        yield record.unsafe_image


def _example(
    folder: Path, record: SageRecord, chosen: Mapping[str, np.ndarray], rejected: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if not np.array_equal(chosen["geometry"], rejected["geometry"]):
        raise PSAError(
            f"{folder}: {record.chosen} and {record.rejected} differ in size, so they cannot get the "
            "same crop; give both one size or remove their rows"
        )
    moments = [each["moments"][view] for view in range(len(chosen["moments"])) for each in (chosen, rejected)]
    original_size, crop = chosen["geometry"]
    return {
        "file_name": record.file_name,
        "caption": record.caption,
        "category": record.category,
        "kind": PROMPT_KINDS[record.unsafe],
        "banned": record.banned,
        "user_id": record.user_id,
        **dict(zip(_moment_names(len(moments) > 2), moments, strict=True)),
        "original_size": original_size,
        "crop": crop,
    }


def _moment_names(flips: bool) -> tuple[str, ...]:
    plain = ("moments_chosen", "moments_rejected")
    return plain + tuple(f"{name}_flipped" for name in plain) if flips else plain


def _token_names(count: int) -> tuple[str, ...]:
    return ("input_ids", *(f"input_ids_{number}" for number in range(2, count + 1)))


def _tokenize(tokenizer: Tokenizer, records: Sequence[SageRecord]) -> Int32[np.ndarray, "n t"]:
    ids = np.asarray(tokenizer([record.caption for record in records]))
    if ids.ndim != 2 or len(ids) != len(records) or not np.issubdtype(ids.dtype, np.integer):
        raise PSAError(f"tokenizer gave {ids.dtype} {ids.shape} for {len(records)} captions; expected integers [n, t]")
    return ids.astype(np.int32)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _counts(records: Sequence[SageRecord], pictures: int) -> dict[str, int]:
    unsafe = sum(record.unsafe for record in records)
    users = len({record.user_id for record in records})
    return {"rows": len(records), "unsafe prompts": unsafe, "users": users, "pictures": pictures}


def _columns_json(records: Sequence[SageRecord]) -> dict[str, list]:
    return {
        "user_id": [record.user_id for record in records],
        "category": [CATEGORIES.index(record.category) for record in records],
        "unsafe": [int(record.unsafe) for record in records],
        "banned": [int(record.banned) for record in records],
    }
