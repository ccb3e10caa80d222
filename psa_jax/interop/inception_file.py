"""The weights of FID's Inception-v3 in one file: safetensors, or the state dict that pytorch-fid published."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.interop.unpickle import read_state
from psa_jax.interop.weights import Tensor, Tensors, abstract_model, load_weights, open_tensors
from psa_jax.models.inception import Inception

# The classifier, which FID leaves out, and counters of training steps.
_UNUSED = re.compile(r"fc\.(weight|bias)|.*\.num_batches_tracked")


class InceptionFile(NamedTuple):
    """FID's Inception-v3 of a file.

    Attributes:
      model: the network.
      weights: sha256 of the file.
    """

    model: Inception
    weights: str


def load_inception(path: Path) -> InceptionFile:
    """Loads the network. A pickle's code is not executed.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth`, or a safetensors file (`*.safetensors`) with the same names.

    Raises:
      PSAError: another file, or a damaged or unsafe one.
    """
    tensors = open_tensors(path) if path.suffix == ".safetensors" else _of_state(path)
    ours = {name: each for name, each in tensors.by_name.items() if not _UNUSED.fullmatch(name)}
    shapes = abstract_model(lambda _, rngs: Inception(rngs=rngs), None)
    model = load_weights(shapes, Tensors(tensors.where, ours), sizes="FID's Inception-v3")
    with path.open("rb") as file:
        return InceptionFile(model, hashlib.file_digest(file, "sha256").hexdigest())


def _of_state(path: Path) -> Tensors:
    """The tensors of a state dict of torch."""
    state = read_state(path, integers=True)
    if groups := [name for name, each in state.items() if isinstance(each, dict)]:
        raise PSAError(f"{path}: {groups[0]!r} is a group of tensors; give the state dict of FID's Inception-v3 alone")
    return Tensors(path, {name: _in_memory(array) for name, array in state.items()})


def _in_memory(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, lambda index: array[index])
