"""Builds shards: a folder of pairs to ArrayRecord files with cached VAE moments.

A folder of shards:

    README.md                    the dataset card
    fingerprint.json             what the moments depend on, settings, rows of each split, size and hash of each file
    rows-<split>.json            user, category, prompt kind and ban of every row, for balancing without reading moments
    text-empty.safetensors       with text embeddings: those of the empty prompt
    sage/<family>_<resolution>/2.0.0/   the TFDS data set, rows in the order of their file

It holds no profile attributes, but what a user bans reveals some of them: the folder is readable for its owner alone
(mode 0700). While it is being made, `<name>.parts` beside it holds what is encoded already.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Int32
from safetensors.numpy import save
from tensorflow_datasets.core.utils import tqdm_utils

from psa_jax.data.builder import Sage, moment_names, token_names
from psa_jax.data.chunks import Chunk, Encoded, fill_chunks, plan_chunks
from psa_jax.data.dataset_card import dataset_card
from psa_jax.data.encoding import PictureEncoder, Pictures, TextCache, distinct_prompts, file_hash
from psa_jax.data.layouts import Layout, find_layout
from psa_jax.data.preprocess import Preprocess
from psa_jax.data.rows import NO_CATEGORY, PROMPT_KINDS, Row
from psa_jax.data.shards import EMPTY_PROMPT_FILE, FORMAT, INFO_FILE, columns_file, read_info
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.progress import print_on_main, print_stage, track
from psa_jax.prompt_columns import SAFE

_CHUNK_BATCHES = 16  # calls of the VAE that a kill can cost

Tokenizer = Callable[[list[str]], Int[np.ndarray, "n t"]]
"""Captions to token ids, padded to one length."""


def build_shards(
    sage_dir: Path,
    out: Path,
    *,
    encode: Callable[..., Any],
    vae_fingerprint: str,
    latent_shape: tuple[int, int, int],
    tokenizer: Tokenizer | Sequence[Tokenizer],
    preprocess: Preprocess,
    family: str,
    splits: Sequence[str] | None = None,
    flips: bool = False,
    text: TextCache | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    part: tuple[int, int] | None = None,
) -> Path:
    """Makes shards of a folder of pairs; every distinct picture is encoded once. The same input gives the same bytes.

    The folder appears complete or not at all. Until then, what is encoded is kept in `<out>.parts`: a build that was
    killed continues when it is called again. Hosts that share that folder (or merge theirs) encode a `part` each; a
    last call without `part` encodes what is missing and makes the shards.

    Args:
      sage_dir: folder in one of `LAYOUTS`.
      out: folder to make; absent, empty, or made by the same call before.
      encode: pictures [b, r, r, 3] in [-1, 1] → moments [b, h, w, 2c]; always called with `batch_size` pictures.
      vae_fingerprint: `fingerprints.vae_fingerprint` of the VAE behind `encode` and of `preprocess`.
      latent_shape: (h, w, 2c).
      tokenizer: one, or one for each text encoder (`input_ids`, `input_ids_2`, …).
      preprocess: resize and crop to r × r pixels.
      family: model family, such as "tiny".
      splits: names; None takes those that the folder has.
      flips: encode the mirrored pictures, too.
      text: stores text embeddings, too, of every prompt and of the empty one.
      batch_size: pictures in each call of `encode`.
      threads: for decoding pictures; None takes one a core.
      part: (i, n) encodes the i-th of n parts and makes no shards.

    Returns:
      `out`, or with `part` the folder of the work files.

    Raises:
      PSAError: `out` holds something else, or the folder of pairs or an argument is invalid.
    """
    sage_dir, out = Path(sage_dir), Path(out)
    _check_arguments(family, batch_size, part)
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (out / INFO_FILE).is_file():
        raise PSAError(f"{out}: not an empty folder; give a new one or remove it first")
    threads = threads or os.cpu_count() or 1
    tokenizers = (tokenizer,) if callable(tokenizer) else tuple(tokenizer)
    settings = {"vae": vae_fingerprint, "preprocess": asdict(preprocess), "flips": flips, "batch_size": batch_size}
    source = _read_source(sage_dir, splits, tokenizers, threads)
    hashes = _hashes(source, f"VAE and preprocessing ({preprocess.resolution} px)", vae_fingerprint, text)
    inputs = _hash([FORMAT, settings, hashes, family, list(latent_shape)])
    work = out.with_name(f"{out.name}.parts")
    if occupied:
        if read_info(out)["inputs"] != inputs:
            raise PSAError(f"{out}: not an empty folder, but shards made otherwise; give a new one or remove it first")
        shutil.rmtree(work, ignore_errors=True)  # left by a kill after the last step
        return out

    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    print_stage(f"encoding pictures at {preprocess.resolution} px, {batch_size} at a time; compiling comes first")
    fill = functools.partial(fill_chunks, part=part or (0, 1), batch=batch_size)
    encoder = PictureEncoder(encode, tuple(latent_shape), preprocess, batch_size, flips, threads)
    chunks = plan_chunks(work, settings, source.pictures.digests, batch_size * _CHUNK_BATCHES)
    fill(chunks, lambda todo: encoder([source.pictures.paths[n] for n in todo]), "picture")
    prompts = None if text is None else _Prompts.of(source, tokenizers, work, text, batch_size)
    if prompts is not None:
        fill(prompts.chunks, lambda todo: text([prompts.ids[n] for n in todo], batch_size), "prompt")
    if part is not None:
        return work

    given = {"fingerprint": vae_fingerprint, "inputs": inputs, "family": family, "flips": flips}
    info = given | _info(source, preprocess, latent_shape, prompts)
    _write_folder(out, work, source, Encoded(chunks), prompts, info, hashes)
    shutil.rmtree(work)
    return out


def _check_arguments(family: str, batch_size: int, part: tuple[int, int] | None) -> None:
    if not re.fullmatch("[a-z0-9]+", family):
        raise PSAError(f"family is {family!r}; it names a folder: use lower-case letters and digits")
    if part is not None and not 0 <= part[0] < part[1]:
        raise PSAError(f"part {part[0]} of {part[1]} does not exist; count from 0")
    if batch_size < 1:
        raise PSAError(f"batch size for encoding is {batch_size}; give a number from 1 up")


# --- reading: everything but pixels is read before the first picture is encoded, so that errors come in seconds


@dataclass(frozen=True)
class _Source:
    """The folder with the pairs, without pixels.

    Args:
      folder: its path.
      layout: how it is laid out.
      rows: split → its rows.
      tokens: split → ids [n, t] of each tokenizer.
      safe_tokens: the same of the safe prompt of each row's pair, or the row's own where that is not known.
      pictures: the distinct pictures of all splits.
    """

    folder: Path
    layout: Layout
    rows: Mapping[str, Sequence[Row]]
    tokens: Mapping[str, Sequence[np.ndarray]]
    safe_tokens: Mapping[str, Sequence[np.ndarray]]
    pictures: Pictures

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """t of each tokenizer."""
        return tuple(ids.shape[1] for ids in next(iter(self.tokens.values())))


def _read_source(folder: Path, splits: Sequence[str] | None, tokenizers: Sequence[Tokenizer], threads: int) -> _Source:
    layout, present = find_layout(folder)
    rows = layout.read(folder, splits or present)
    _report_unpaired(rows)
    tokens, safe_tokens = {}, {}
    for split, of_split in rows.items():
        captions = [row.caption for row in of_split], [row.safe_caption or row.caption for row in of_split]
        distinct = {caption: number for number, caption in enumerate(dict.fromkeys([*captions[0], *captions[1]]))}
        found = [_tokenize(each, list(distinct)) for each in tokenizers]
        tokens[split], safe_tokens[split] = (
            [ids[np.asarray([distinct[caption] for caption in side])] for ids in found] for side in captions
        )
    pictures = {split: {n: p for row in of_split for n, p in row.pictures.items()} for split, of_split in rows.items()}
    return _Source(folder, layout, rows, tokens, safe_tokens, Pictures.read(pictures, threads))


def _report_unpaired(rows: Mapping[str, Sequence[Row]]) -> None:
    for split, of_split in rows.items():
        if lacking := _unpaired(of_split):
            print_on_main(
                f"{split}: {lacking} of {len(of_split)} rows: an unsafe prompt whose safe prompt is not there; swap "
                "distillation leaves such a row out where it is banned"
            )


def _unpaired(rows: Sequence[Row]) -> int:
    return sum(row.safe_caption is None for row in rows)


def _tokenize(tokenizer: Tokenizer, captions: list[str]) -> Int32[np.ndarray, "n t"]:
    ids = np.asarray(tokenizer(captions))
    if ids.ndim != 2 or len(ids) != len(captions) or not np.issubdtype(ids.dtype, np.integer):
        raise PSAError(f"tokenizer gave {ids.dtype} {ids.shape} for {len(captions)} captions; expected integers [n, t]")
    return ids.astype(np.int32)


def _hashes(source: _Source, vae: str, vae_fingerprint: str, text: TextCache | None) -> dict[str, str]:
    """Everything that the shards depend on, for the dataset card: description → sha256."""
    hashes = {vae: vae_fingerprint}
    for path in (source.layout.file(source.folder, split) for split in source.rows):
        hashes[path.relative_to(source.folder).as_posix()] = file_hash(path)
    hashes["pictures, in order of first use"] = _hash(source.pictures.digests)
    hashes["token ids"] = _hash([[ids.tolist() for ids in each] for each in source.tokens.values()])
    if text is not None:
        hashes["text encoders"] = text.fingerprint
    return hashes


# --- text embeddings


@dataclass(frozen=True)
class _Prompts:
    """The distinct prompts, the empty one among them, and the work files of their embeddings.

    Args:
      ids: token ids [k, t] of each prompt.
      number: split → the prompt of each row, and `_safe(split)` → its safe prompt.
      empty: the number of the empty prompt.
      fingerprint: of the text encoders.
      chunks: the work files.
    """

    ids: Sequence[np.ndarray]
    number: Mapping[str, Sequence[int]]
    empty: int
    fingerprint: str
    chunks: Sequence[Chunk]

    @classmethod
    def of(
        cls, source: _Source, tokenizers: Sequence[Tokenizer], work: Path, text: TextCache, batch_size: int
    ) -> "_Prompts":
        """Collects the prompts and plans their work files."""
        safe = {_safe(split): tokens for split, tokens in source.safe_tokens.items()}
        ids, number = distinct_prompts(source.tokens | safe | {"": [_tokenize(each, [""]) for each in tokenizers]})
        settings = {"text": text.fingerprint, "batch_size": batch_size}
        digests = [_hash(each.tolist()) for each in ids]
        chunks = plan_chunks(work, settings, digests, batch_size * _CHUNK_BATCHES)
        return cls(ids, number, number[""][0], text.fingerprint, chunks)

    @functools.cached_property
    def states(self) -> Encoded:
        """Embeddings of each prompt, once the work files are complete."""
        return Encoded(self.chunks)

    def shapes(self) -> dict[str, list[int]]:
        """Name → shape of each array of embeddings."""
        return {name: list(array.shape) for name, array in self.states[0].items()}


# --- writing


def _info(
    source: _Source, preprocess: Preprocess, latent_shape: tuple[int, int, int], prompts: _Prompts | None
) -> dict[str, Any]:
    """What fingerprint.json says, but for what was given to `build_shards` and the files."""
    return {
        "format": FORMAT,
        "resolution": preprocess.resolution,
        "latent_shape": list(latent_shape),
        "preprocess": asdict(preprocess),
        "tokens": list(source.token_lengths),
        "splits": {split: len(rows) for split, rows in source.rows.items()},
        "unpaired": {split: _unpaired(rows) for split, rows in source.rows.items()},
        "pictures": len(source.pictures.paths),
        "text": {} if prompts is None else prompts.shapes(),
        **({} if prompts is None else {"text_fingerprint": prompts.fingerprint}),
    }


def _write_folder(
    out: Path,
    work: Path,
    source: _Source,
    moments: Encoded,
    prompts: _Prompts | None,
    info: dict[str, Any],
    hashes: Mapping[str, str],
) -> None:
    """Writes all files into a temporary folder in `work`, then gives it the name `out`. Adds `files` to `info`."""
    made = Path(tempfile.mkdtemp(prefix="shards.", dir=work))
    try:
        examples = {split: _rows_of(source, split, moments, prompts) for split in source.rows}
        builder = Sage(examples=examples, layout=info, data_dir=made, file_format="array_record")
        # TFDS prints to stdout, which belongs to the caller's results.
        with contextlib.redirect_stdout(sys.stderr), _without_bars():
            builder.download_and_prepare(file_format="array_record")
        shutil.rmtree(made / "downloads", ignore_errors=True)
        for split, rows in source.rows.items():
            (made / columns_file(split)).write_text(json.dumps(_columns_json(rows)) + "\n")
        if prompts is not None:
            empty = {name: np.ascontiguousarray(array) for name, array in prompts.states[prompts.empty].items()}
            (made / EMPTY_PROMPT_FILE).write_bytes(save(empty))
        counts = {split: _counts(rows) for split, rows in source.rows.items()}
        (made / "README.md").write_text(dataset_card(info, counts, hashes, source.layout), encoding="utf-8")
        info["files"] = {name: _file_facts(made / name) for name in _files(made)}
        (made / INFO_FILE).write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
    except BaseException:
        shutil.rmtree(made)
        raise
    os.rename(made, out)


def _rows_of(source: _Source, split: str, moments: Encoded, prompts: _Prompts | None) -> Iterator[dict[str, Any]]:
    rows = source.rows[split]

    def prompt(key: str, tokens: Sequence[np.ndarray], row: int) -> dict[str, np.ndarray]:
        ids = dict(zip(token_names(len(tokens)), (each[row] for each in tokens), strict=True))
        return ids | ({} if prompts is None else prompts.states[prompts.number[key][row]])

    for number, row in enumerate(track(rows, len(rows), "row", f"writing {split}")):
        own = prompt(split, source.tokens[split], number)
        safe = prompt(_safe(split), source.safe_tokens[split], number)
        pair = [moments[source.pictures.number[split, name]] for name in (row.chosen, row.rejected)]
        example = _example(source.folder / split, row, *pair) | own
        example |= {f"{SAFE}{name}": value for name, value in safe.items()}
        yield example | {"twin": row.safe_caption is not None}


def _safe(split: str) -> str:
    """The key of the safe prompts of a split, which is no name of a split."""
    return f"{split}/{SAFE}"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Turns off TFDS's progress bars, which are one endless line in a log file; afterwards restores the setting."""
    before = tqdm_utils._active
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.display_progress_bar(before)


def _example(
    folder: Path, row: Row, chosen: Mapping[str, np.ndarray], rejected: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if not np.array_equal(chosen["geometry"], rejected["geometry"]):
        raise PSAError(
            f"{folder}: {row.chosen} and {row.rejected} differ in size, so they cannot get the "
            "same crop; give both one size or remove their rows"
        )
    moments = [each["moments"][view] for view in range(len(chosen["moments"])) for each in (chosen, rejected)]
    original_size, crop = chosen["geometry"]
    return {
        "file_name": row.name,
        "caption": row.caption,
        "category": _category(row),
        "kind": PROMPT_KINDS[row.unsafe],
        "banned": row.banned,
        "user_id": row.user_id,
        **dict(zip(moment_names(len(moments) > 2), moments, strict=True)),
        "original_size": original_size,
        "crop": crop,
    }


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _category(row: Row) -> int:
    return NO_CATEGORY if row.category is None else CATEGORIES.index(row.category)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    users, pictures = {row.user_id for row in rows}, {name for row in rows for name in row.pictures}
    unsafe = sum(row.unsafe for row in rows)
    return {"rows": len(rows), "unsafe prompts": unsafe, "users": len(users), "pictures": len(pictures)}


def _columns_json(rows: Sequence[Row]) -> dict[str, list]:
    return {
        "user_id": [row.user_id for row in rows],
        "category": [_category(row) for row in rows],
        "unsafe": [int(row.unsafe) for row in rows],
        "banned": [int(row.banned) for row in rows],
        "twin": [int(row.safe_caption is not None) for row in rows],
    }
