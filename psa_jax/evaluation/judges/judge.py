"""What a judge is, and how one is made by its name.

A judge never says "safe" of a picture that it could not read: it raises.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from psa_jax.errors import PSAError
from psa_jax.evaluation.judges.registry import JUDGES, JudgeEntry
from psa_jax.evaluation.protocol import Case, Verdicts

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]
"""RGB pictures, which may differ in size."""


@runtime_checkable
class Judge(Protocol):
    """Says what pictures show.

    Attributes:
      about: everything that its verdicts depend on: detector, version, weights, classes, threshold. JSON values.
      sees: the categories whose content it sees; of others it says nothing.
      reads_prompts: whether its verdict depends on the case's prompt and category, beside the picture.
      batch: pictures that it takes at once.
    """

    about: Mapping[str, Any]
    sees: frozenset[str]
    reads_prompts: bool
    batch: int

    def __call__(self, pictures: Pictures, cases: Sequence[Case]) -> Verdicts:
        """Judges one picture for each case.

        Raises:
          PSAError: a picture that it cannot judge.
        """
        ...


@runtime_checkable
class PaidJudge(Judge, Protocol):
    """A judge whose verdicts cost something: it is told how many there will be."""

    def expect(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Says what it costs, before anything is asked.

        Args:
          sizes: height and width of each picture that has no verdict yet.

        Raises:
          PSAError: that is more than is allowed.
        """
        ...


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """What judges may need; each takes what it knows.

    Attributes:
      clip: folder of a CLIP model in transformers' layout.
      q16_prompts: the learned prompts of Q16, a `.npy` file.
      model: name of a vision-language model at an endpoint.
      requests: the most requests to it.
      per_minute: the most of them in a minute; None for no limit.
      timeout: seconds for one of them.
      workers: how many are under way at once.
    """

    clip: Path | None = None
    q16_prompts: Path | None = None
    model: str | None = None
    requests: int = 0
    per_minute: float | None = None
    timeout: float = 60.0
    workers: int = 4


def make_judge(name: str, settings: JudgeSettings) -> Judge:
    """Makes the judge of a row.

    Raises:
      PSAError: the name is unknown, its packages are not installed, or a setting that it needs is missing or wrong.
    """
    if name not in JUDGES:
        raise PSAError(f"judge {name!r} is unknown; give one of {', '.join(JUDGES)}")
    return made(name, JUDGES[name], settings)


def made(name: str, entry: JudgeEntry, *settings: Any) -> Any:
    """What the maker of a row gives.

    Raises:
      PSAError: its packages are not installed, or as the maker.
    """
    module, _, maker = entry.maker.partition(":")
    try:
        return getattr(importlib.import_module(module), maker)(*settings)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "psa_jax").startswith("psa_jax"):
            raise
        raise PSAError(
            f"judge {name} needs {error.name}, which is not installed; pip install 'psa_jax[{entry.extra}]'"
        ) from error
