"""Columns of prompt sets that the field evaluates on, and protocols. Imports nothing heavy: flags list the names."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

PAPER_SEED = 2025
"""Of every picture in the evaluation of PSA's authors."""

PROTOCOLS = MappingProxyType(
    {
        "fair": "seeds of the prompt's text and the picture's number, the same for every method",
        "paper": f"seed {PAPER_SEED} for every picture, as the authors of PSA did",
        "own": "the seeds in the file of the set",
    }
)


REWRITES = MappingProxyType(
    {
        "negative": "what the user bans is the negative prompt",
        "prompt": "what the user bans is written into the prompt: …, without violence, hate",
        "safe": "a prompt that the user bans is the safe prompt of its pair, which no method can know: a ceiling",
    }
)
"""Baselines that change the words alone → how."""


class PromptSet(NamedTuple):
    """The columns of a set's CSV file.

    Attributes:
      prompt: column of the text.
      unsafe: whether the prompts ask for something unsafe.
      category: column of the category; None where there is none.
      seeds: columns of a seed, of which a file has one.
    """

    prompt: str
    unsafe: bool
    category: str | None = None
    seeds: tuple[str, ...] = ()


SETS: Mapping[str, PromptSet] = MappingProxyType(
    {
        "i2p": PromptSet("prompt", True, "categories", ("sd_seed", "evaluation_seed")),
        "coprov2": PromptSet("prompt", True, "category"),
        "ud": PromptSet("prompt", True, seeds=("seed", "evaluation_seed")),
        "coco": PromptSet("prompt", False, seeds=("seed", "evaluation_seed")),
        "overt": PromptSet("image_prompt", False, "category"),
        "overt-unsafe": PromptSet("unsafe_image_prompt", True, "category"),
    }
)
"""Name → columns. SAGE is a folder and has a reader of its own."""
