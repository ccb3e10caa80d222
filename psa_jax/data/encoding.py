"""The two long encodings of a build: every distinct picture through the VAE, every distinct prompt through the text
encoders. What comes out is cached in work files (`chunks`), by what it was made from."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from psa_jax.data.batched import encode_images, half, in_batches
from psa_jax.data.chunks import map_ahead
from psa_jax.data.images import open_image
from psa_jax.data.preprocess import Preprocess
from psa_jax.errors import PSAError
from psa_jax.progress import track


@dataclass(frozen=True)
class Pictures:
    """The distinct pictures of some splits: files with the same bytes are one picture.

    Args:
      paths: the first file of each picture.
      digests: sha256 of each picture.
      number: (split, name) → the number of the picture.
    """

    paths: Sequence[Path]
    digests: Sequence[str]
    number: Mapping[tuple[str, str], int]

    @classmethod
    def read(cls, found: Mapping[str, Mapping[str, Path]], threads: int) -> "Pictures":
        """Hashes every picture of every split, without decoding it.

        Args:
          found: split → name → path of its pictures.
          threads: for reading.

        Raises:
          PSAError: a picture cannot be read.
        """
        places = [(split, name) for split, of_split in found.items() for name in of_split]
        paths = [found[split][name] for split, name in places]
        hashes = map_ahead(file_hash, paths, threads, 8 * threads)
        digests = list(track(hashes, len(paths), "picture", "reading"))
        first = dict(zip(digests[::-1], paths[::-1], strict=True))
        distinct = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
        number = {place: distinct[digest] for place, digest in zip(places, digests, strict=True)}
        return cls([first[digest] for digest in distinct], list(distinct), number)


@dataclass(frozen=True)
class PictureEncoder:
    """Encodes pictures to moments; threads decode pictures ahead of the VAE.

    Args:
      encode: [b, r, r, 3] in [-1, 1] → moments [b, h, w, 2c].
      latent_shape: (h, w, 2c).
      preprocess: resize and crop.
      batch_size: b.
      flips: encode every picture mirrored, too.
      threads: for decoding.
    """

    encode: Callable[..., Any]
    latent_shape: tuple[int, int, int]
    preprocess: Preprocess
    batch_size: int
    flips: bool
    threads: int

    def __call__(self, paths: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
        """Yields, for each picture, `moments` [1 or 2, h, w, 2c] float16 and `geometry` [2, 2]: original size and crop.

        Raises:
          PSAError: a picture that `open_image` refuses, or moments of another shape or not finite in float16.
        """
        geometry: list[np.ndarray] = []

        def load(path: Path):
            return self.preprocess(open_image(path))

        def pixels() -> Iterator[np.ndarray]:
            for prepared in map_ahead(load, paths, self.threads, 2 * self.batch_size):
                geometry.append(np.asarray([prepared.original_size, prepared.crop], np.int32))
                yield prepared.pixels
                if self.flips:
                    yield prepared.pixels[:, ::-1]

        moments = encode_images(self.encode, pixels(), self.batch_size)
        for number in range(len(paths)):
            views = [next(moments) for _ in range(1 + self.flips)]
            if views[0].shape != tuple(self.latent_shape):
                raise PSAError(
                    f"encoder gave moments of shape {views[0].shape}, expected {tuple(self.latent_shape)}; "
                    "check the VAE"
                )
            yield {"moments": np.stack(views), "geometry": geometry[number]}


@dataclass(frozen=True)
class TextCache:
    """Encodes prompts to the text embeddings that are stored in shards.

    Args:
      encode: ids [b, k, t] of k tokenizers → `states` [b, t, c] and, with two encoders, `pooled` [b, p].
      fingerprint: `fingerprints.text_fingerprint` of the text encoders.
    """

    encode: Callable[[Int32[np.ndarray, "b k t"]], Mapping[str, Any]]
    fingerprint: str

    def __call__(self, ids: Sequence[np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields, for each prompt, `text_states` [t, c] and, with two encoders, `text_pooled` [p], in float16.

        Args:
          ids: token ids [k, t] of each prompt.
          batch_size: b.

        Raises:
          PSAError: a number that is not finite in float16.
        """
        for number, row in enumerate(in_batches(self.encode, ids, batch_size)):
            yield {f"text_{name}": half(value, f"{name} of prompt {number}") for name, value in row.items()}


def distinct_prompts(tokens: Mapping[str, Sequence[np.ndarray]]) -> tuple[list[np.ndarray], dict[str, list[int]]]:
    """Collects the distinct prompts.

    Args:
      tokens: split → ids [n, t] of each of k tokenizers.

    Returns:
      The token ids [k, t] of every distinct prompt, and split → the number of each row's prompt.

    Raises:
      PSAError: tokenizers of different lengths.
    """
    distinct: dict[bytes, int] = {}
    ids, number = [], {}
    for split, each in tokens.items():
        if len({array.shape[1] for array in each}) != 1:
            raise PSAError("text embeddings need tokenizers of one length; leave them out of the shards")
        rows = np.stack(each, axis=1)  # [n, k, t]
        number[split] = []
        for row in rows:
            known = len(distinct)
            number[split].append(distinct.setdefault(row.tobytes(), known))
            if len(distinct) > known:
                ids.append(row)
    return ids, number


def file_hash(path: Path) -> str:
    """sha256 of a file, as 64 hex digits.

    Raises:
      PSAError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PSAError(f"{path}: cannot be read ({error.strerror}); restore it or remove its rows") from error
