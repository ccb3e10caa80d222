"""Who may read a file that is written: one rule, by whether the file tells about a person.

- Profiles, embeddings, user ids with their bans, and weights into which one user was baked do: their owner alone
  (`profiles.files.write_private`, and whatever is written within `owner_only`).
- Weights of adapters and base models, configurations and cards do not: whoever the umask lets (`save_tensors`).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """Files and folders made within are their owner's from the first byte on; of the whole process."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file for whoever the umask lets read it; the library makes files of their owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)
