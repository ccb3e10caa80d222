"""The TFDS data set `sage`: rows of SAGE with cached VAE moments, in ArrayRecord files.

`psa_jax.data.build.build_shards` makes it; `tfds.load` and `tfds.builder_from_directory` read it.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.proto import tf_example_pb2

from psa_jax.data.rows import PROMPT_KINDS
from psa_jax.data.shards import VERSION, read_info
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.prompt_columns import SAFE, is_prompt


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
    """Mapping from every name such as sd1_512 to its configuration, for TFDS to look names up in."""

    def __getitem__(self, name: str) -> SageConfig:
        match = re.fullmatch("([a-z0-9]+)_([0-9]+)", name)
        if match is None:
            raise KeyError(name)
        return _config(match[1], int(match[2]))

    def __iter__(self) -> Iterator[str]:
        return iter(())  # the configurations that exist are those of the folder

    def __len__(self) -> int:
        return 0


@functools.cache  # TFDS refuses two configurations of one name
def _config(family: str, resolution: int) -> SageConfig:
    return SageConfig(name=f"{family}_{resolution}", family=family, resolution=resolution)


class Sage(tfds.core.GeneratorBasedBuilder):
    """The data set.

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
            # By default, TFDS without TensorFlow writes float16 number by number: ten times slower, the same size.
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
            **{name: half(self._layout["latent_shape"]) for name in moment_names(self._layout["flips"])},
            **{name: half(shape) for name, shape in self._layout["text"].items()},
            "original_size": integers(2),
            "crop": integers(2),
            **{name: integers(length) for name, length in zip(token_names(len(tokens)), tokens, strict=True)},
            "twin": tfds.features.Scalar(np.bool_),
        }
        features |= {f"{SAFE}{name}": feature for name, feature in features.items() if is_prompt(name)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="SAGE: prompts with a chosen and a rejected picture, as VAE moments (mean, log-variance).",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # row i of the shards is row i of metadata.jsonl
        )

    def as_dataset(self, split: Any = None, *, decoders: Any = None, **options: Any) -> Any:
        """The same as `as_data_source`: rows by number. TFDS has no `tf.data` reader for ArrayRecord.

        Args:
          split, decoders: as in TFDS.
          options: other arguments of TFDS, which must be left at their defaults.

        Raises:
          PSAError: an option that only `tf.data` has.
        """
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

    # Nothing is downloaded, and TFDS would report unknown sizes; `build_shards` reports its own progress.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return _SortedExampleWriter(file_format=self.info.file_format)


class _SortedExampleWriter(tfds_writer.ExampleWriter):
    """Writes every record with its features in order of their names: the same rows give the same bytes.

    Protocol buffers order the entries of a map differently from process to process. Records are written without
    compression, which TFDS has no option for: moments are mostly noise, and decompressing takes half of a row's time.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
        """Writes (key, record) pairs in the given order; TFDS calls it."""
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for _, record in examples:
            writer.write(_sorted_example(record))
        writer.close()


def _sorted_example(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def moment_names(flips: bool) -> tuple[str, ...]:
    """Names of the columns with moments; with `flips`, those of the mirrored pictures follow."""
    plain = ("moments_chosen", "moments_rejected")
    return plain + tuple(f"{name}_flipped" for name in plain) if flips else plain


def token_names(count: int) -> tuple[str, ...]:
    """Names of the columns with token ids, one for each of `count` text encoders."""
    return ("input_ids", *(f"input_ids_{number}" for number in range(2, count + 1)))
