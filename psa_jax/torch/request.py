"""What a call of a pipeline with a user adapter knows: its users, and the text that the adapter is in already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from psa_jax.errors import PSAError

EMBEDS = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
"""What `encode_prompt` gives, by the parameters that take it; Stable Diffusion without XL has the first two."""


@dataclass
class Request:
    """State of the current call.

    Attributes:
      users: embeddings [1 or prompts, D], or what they ban [1 or prompts, 7]; None for the base model without a user.
      scale: strengths [1 or prompts].
      unconditional: as in `PSA.applied`.
      text: text states that the UNet must receive, of both sides of guidance.
      pooled: pooled text that it must receive; None where the adapter does not edit it.
      steps: number of the scheduler's steps so far, each of them checked.
      adapted: outputs of `encode_prompt` that contain an adapter of the kinds before the UNet, for both sides: text
        states and, where it is edited, pooled text.
      edited_rows: rows of pooled text that the adapter changed, for both sides.
      used: whether the pipeline was called.
      by_bans: whether `users` holds what they ban.
    """

    users: Tensor | None
    scale: Tensor
    unconditional: str
    text: Tensor | None = None
    pooled: Tensor | None = None
    steps: int = 0
    adapted: tuple[list[tuple[Tensor, ...]], ...] = field(default_factory=lambda: ([], []))
    edited_rows: tuple[list[Tensor], ...] = field(default_factory=lambda: ([], []))
    used: bool = False
    by_bans: bool = False

    def with_edits(
        self,
        encoded: tuple,
        sides: Sequence[int],
        made: Sequence[Tensor],
        scale: Tensor,
        arguments: Mapping[str, Any],
    ) -> tuple:
        """The output of `encode_prompt` with the adapter in it once, also where it was given in a parameter.

        Args:
          encoded: the pipeline's output, in the order of EMBEDS.
          sides: 0 with the prompt, 1 unconditional, in the order of the rows.
          made: the adapter's text states and, where it edits it, pooled text, of all sides.
          scale: strength of each row.
          arguments: of `encode_prompt`.

        Raises:
          PSAError: only a part of what was given contains the adapter.
        """
        encoded, count = list(encoded), len(sides)
        parts = zip(*(one.chunk(count) for one in made), strict=True)
        for side, new, strength in zip(sides, parts, scale.chunk(count), strict=True):
            places = (side, side + 2)[: len(new)]
            before = tuple(encoded[place] for place in places)
            answer = before
            if not self._has_adapted(side, [EMBEDS[place] for place in places], arguments):
                answer = tuple(one.to(old) for one, old in zip(new, before, strict=True))
            if strength.any():
                self.adapted[side].append(answer)
                for one, old in zip(answer[1:], before[1:], strict=True):
                    self.edited_rows[side].extend(row for row, was in zip(one, old, strict=True) if (row != was).any())
            for place, one in zip(places, answer, strict=True):
                encoded[place] = one
        return tuple(encoded)

    def _has_adapted(self, side: int, names: Sequence[str], arguments: Mapping[str, Any]) -> bool:
        """Whether given text already contains the adapter: an earlier output of `encode_prompt`.

        Args:
          side: 0 with the prompt, 1 unconditional.
          names: parameters of `encode_prompt` for text states and, where it is edited, pooled text.
          arguments: of `encode_prompt`.

        Raises:
          PSAError: only some rows contain the adapter, or only one of both.
        """
        given, answers = [arguments[name] for name in names], self.adapted[side]
        if given[0] is None or not answers:
            return False
        known = [one for one in answers if _same(one[0], given[0])]
        if known:
            if any(all(_same(*both) for both in zip(one, given, strict=True)) for one in known):
                return True
            raise PSAError(
                f"{names[0]} has the adapter in it already, {names[1]} has it not; give both as encode_prompt gave them"
            )
        of_rows = [row for one in answers for row in one[0]], self.edited_rows[side]
        for name, rows, new in zip(names, of_rows, given, strict=False):
            if any(_same(row, one) for row in rows for one in new):
                raise PSAError(f"{name} has rows that the adapter is in already; give what encode_prompt gave, whole")
        return False


def _same(known: Tensor, given: Tensor | None) -> bool:
    return given is not None and known.shape == given.shape and torch.equal(known, given.to(known))
