"""Embeddings of pictures on disk, by what they depend on: computed once, and gone on with after a kill."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from psa_jax.data.images import open_image
from psa_jax.errors import PSAError
from psa_jax.evaluation.embedder import BATCH, Embedder
from psa_jax.files import read_bytes, write_private
from psa_jax.progress import Progress

_CHUNK = 4 * BATCH


class EmbeddingStore:
    """Embeddings of one model. Several may share a folder.

    Args:
      folder: for the files; made where it is missing.
      model: what gives the embeddings.
    """

    def __init__(self, folder: Path, model: Embedder):
        self._folder, self._model = folder, model

    def pictures(self, paths: Sequence[Path], name: str) -> Float[np.ndarray, "n d"]:
        """Embeddings of n pictures, which may be listed several times.

        Args:
          paths: of the pictures.
          name: of what is embedded, for the progress bar.

        Raises:
          PSAError: a picture that cannot be read, or a file that is damaged.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        digests = {path: hashlib.sha256(read_bytes(path)).hexdigest() for path in dict.fromkeys(paths)}
        first = {digest: path for path, digest in reversed(digests.items())}
        order = sorted(first)
        found: dict[str, np.ndarray] = {}
        with Progress(len(order), "picture", f"embedding {name}") as progress:
            for start in range(0, len(order), _CHUNK):
                part = order[start : start + _CHUNK]
                found |= dict(zip(part, self._part(part, first), strict=True))
                progress.step(len(part))
        return np.stack([found[digests[path]] for path in paths])

    def _part(self, digests: Sequence[str], paths: dict[str, Path]) -> Float[np.ndarray, "n d"]:
        key = hashlib.sha256("\n".join([self._model.weights, *digests]).encode()).hexdigest()[:24]
        file = self._folder / f"{key}.npy"
        if file.exists():
            try:
                found = np.load(file, allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise PSAError(f"{file}: damaged; delete it and run again") from error
            if found.shape != (len(digests), self._model.width) or found.dtype != np.float64:
                raise PSAError(f"{file}: damaged; delete it and run again")
            return found
        found = self._model.pictures([open_image(paths[digest]) for digest in digests])
        content = io.BytesIO()
        np.save(content, found)
        write_private(file, content.getvalue())
        return found
