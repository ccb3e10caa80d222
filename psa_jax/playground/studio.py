"""Sets of pictures for the page: all users of a request in one batch, from the same noise."""

import base64
import io
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from psa_jax.evaluation.gate_words import sentence
from psa_jax.pipeline import Pipeline
from psa_jax.playground.asked import Asked


class Studio:
    """What draws for the page.

    Args:
      pipe: base model and adapter.
      settings: of the sampler, for `Pipeline.generate`, without steps and guidance.
      batch: pictures a program draws. Smaller sets are padded: compiling takes far longer than drawing one more. A
        larger set has a program of its own.
    """

    def __init__(self, pipe: Pipeline, settings: Mapping[str, Any], batch: int):
        self._pipe, self._settings, self._batch = pipe, dict(settings), batch
        self._has_gate = pipe.adapter is not None and pipe.adapter.config.by_categories

    def draw(self, asked: Asked) -> dict[str, Any]:
        """Draws a set.

        Returns:
          The reply to the page: of each user the picture and what is replaced, the base model's picture if it was asked
          for, notes, and the seconds that it took.

        Raises:
          PSAError: settings that the sampler does not support.
        """
        began = time.monotonic()
        # The base model is the adapter at strength 0, whoever the user is: so one batch draws all.
        profiles = [*asked.users, *asked.users[:1]] if asked.base else list(asked.users)
        scales = [asked.scale] * len(asked.users) + [0.0] * asked.base
        pictures = self._pipe.generate(
            [asked.prompt] * len(profiles),
            profile=profiles,
            seed=asked.seed,
            scale=scales,
            steps=asked.steps,
            guidance=asked.guidance,
            batch_size=max(self._batch, len(profiles)),
            **self._settings,
        )
        users = [{"picture": _data_url(picture)} for picture in pictures[: len(asked.users)]]
        if self._has_gate:
            rows = max(self._batch, len(users))
            padded = [*asked.users, *asked.users[:1] * (rows - len(users))]
            found = self._pipe.explain([asked.prompt] * rows, profile=padded)
            for user, gates in zip(users, found, strict=False):
                user["gates"] = {name: round(value, 4) for name, value in gates.items()}
                user["said"] = sentence(list(gates.values()), "this user bans")
        return {
            "users": users,
            "base": _data_url(pictures[-1]) if asked.base else None,
            "notes": self._notes(asked.prompt),
            "seconds": round(time.monotonic() - began, 3),
        }

    def _notes(self, prompt: str) -> list[str]:
        lost = self._pipe.model.truncated([prompt])[0]
        return [f"The text encoder does not read the end of this prompt: “{lost.strip()}”"] if lost else []


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
