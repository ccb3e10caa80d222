"""Pictures of a comparison on disk with their manifest, so that they can be looked at and judged again."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from psa_jax.evaluation.manifest import Pictured, write_manifest
from psa_jax.evaluation.protocol import Case
from psa_jax.files import PRIVATE, owner_only, replacing


def keep_pictures(
    folder: Path,
    method: str,
    group: str,
    cases: Sequence[Case],
    pictures: UInt8[np.ndarray, "n h w 3"],
    gates: Sequence[str] | None = None,
) -> list[tuple[Path, Pictured]]:
    """Writes one PNG for each case, and their manifest; for their owner alone, who can read there who bans what.

    Args:
      folder: for the files; what an earlier run left there is replaced.
      method: what drew them.
      group: of the users.
      cases: n of them.
      pictures: of the cases.
      gates: what the adapter says that it replaces in each; None where it says nothing.

    Returns:
      Path and line of each; a user's prompt that is there twice is listed once.
    """
    listed = {}
    with owner_only():
        folder.mkdir(parents=True, exist_ok=True)
        for index, (case, pixels) in enumerate(zip(cases, pictures, strict=True)):
            facts = {name: getattr(case, name) for name in ("prompt", "user_id", "category", "unsafe", "banned")}
            name = hashlib.sha256(case.prompt.encode()).hexdigest()[:12]
            line = Pictured(f"{index:05d}.png", method, name, case.seed, group=group, **facts)
            if gates is not None:
                line = dataclasses.replace(line, gate=gates[index])
            path = folder / line.file
            if (name, case.user_id) not in listed:
                with replacing(path, PRIVATE) as temporary:
                    Image.fromarray(pixels).save(temporary, format="PNG")
                listed[name, case.user_id] = (path, line)
    write_manifest(folder, [line for _, line in listed.values()])
    return list(listed.values())
