"""The `qwen` encoder: hidden states of a language model that reads a prompt about a profile, pooled over tokens."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from psa_jax.errors import PSAError
from psa_jax.interop.qwen2 import LanguageModel, load_qwen2, pad_left
from psa_jax.models.qwen2 import Qwen2
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoders import EARLIER
from psa_jax.profiles.profile_prompt import PROFILE, QUESTION, Answer, Template, count_answers, decide, read_template
from psa_jax.profiles.schema import UserProfile
from psa_jax.progress import Progress

POOLINGS = ("mean", "sum")
_BUCKET = 64  # lengths are rounded up to this, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class QwenEncoder:
    """Qwen2.5's last hidden states, pooled over the tokens of the profile prompt.

    Args:
      language_model: Qwen2.5 with its tokenizer.
      template: the prompt.
      pooling: "mean" (as in tables that the torch original stored) or "sum" (as it does at run time).
      ask_model: ask the model for the banned categories in the prompt, instead of using the ban rules; see
        `profile_prompt.decide`.
      batch_size: prompts in one run of the model; it changes the numbers only by rounding.
      max_new_tokens: longest reply to the question, in tokens; a longer one is cut off and most likely unparsable.

    Attributes:
      counts: counts of the replies so far, by `profile_prompt.count_answers`.

    Raises:
      PSAError: an unknown pooling, a size below one, or `ask_model` with a model that has no end-of-reply token.
    """

    language_model: LanguageModel
    template: Template = PROFILE
    pooling: str = "mean"
    ask_model: bool = False
    batch_size: int = 16
    max_new_tokens: int = 64
    counts: Counter = field(default_factory=Counter)

    VERSION = 1  # raise it when the numbers change while the settings stay

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise PSAError(f"encoder qwen: pooling {self.pooling!r} does not exist; use one of: {', '.join(POOLINGS)}")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise PSAError(f"encoder qwen: {name} is {getattr(self, name)}; give 1 or more")
        if self.ask_model and not self.language_model.stop_tokens:
            raise PSAError(
                f"{self.language_model.folder}: no eos_token_id, so no reply would end; set it in config.json"
            )

    @property
    def name(self) -> str:
        """The encoder's key in `ENCODERS`."""
        return "qwen"

    @property
    def dim(self) -> int:
        """D, the width of the model's hidden states."""
        return self.language_model.model.config.hidden_size

    @property
    def _settings(self) -> dict[str, str]:
        """Everything besides the model that changes the numbers."""
        return {
            "pooling": self.pooling,
            "template": self.template.hash,
            "bans": f"model {QUESTION.hash}, {self.max_new_tokens} tokens" if self.ask_model else "policy",
        }

    @property
    def notes(self) -> dict[str, str]:
        """Facts for the table: settings, the model and, if it is asked, counts of its replies."""
        return {
            **self._settings,
            "model": self.language_model.fingerprint,
            EARLIER: self._named_after(self.language_model.files_fingerprint),
            **({"replies": json.dumps(self.counts, sort_keys=True)} if self.ask_model else {}),
        }

    @property
    def fingerprint(self) -> str:
        """Version, pooling and hash of the settings and the model."""
        return self._named_after(self.language_model.fingerprint)

    def _named_after(self, model: str) -> str:
        settings = {**self._settings, "model": model}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"qwen-v{self.VERSION}-{self.pooling}-{digest[:16]}"

    def encode(self, profiles: Sequence[UserProfile]) -> Float32[np.ndarray, "n d"]:
        """The pooled states of each profile's prompt.

        Raises:
          PSAError: a prompt that is too long for the model, or states that are not finite.
        """
        if self.ask_model:
            bans = [answer.banned for answer in self.ask(profiles)]
        else:
            bans = [banned_categories(profile) for profile in profiles]
        prompts = [self.template.render(profile, banned) for profile, banned in zip(profiles, bans, strict=True)]
        model = self.language_model.model
        rows = [
            np.asarray(pooled_states(model, ids, mask, self.pooling))[:count]
            for ids, mask, count in self._batches(prompts, self.template.where)
        ]
        embeddings = np.concatenate([np.empty((0, self.dim), np.float32), *rows])
        if not np.isfinite(embeddings).all():
            raise PSAError(f"{self.language_model.folder}: states are not finite; give another --dtype")
        return embeddings

    def ask(self, profiles: Sequence[UserProfile]) -> list[Answer]:
        """Asks the model for the bans of each profile, applies `profile_prompt.decide` and counts the answers."""
        lm = self.language_model
        replies = []
        questions = [QUESTION.render(profile, ()) for profile in profiles]
        for ids, mask, count in self._batches(questions, QUESTION.where, self.max_new_tokens):
            tokens = _generate(lm.model, ids, mask, self.max_new_tokens, lm.stop_tokens)
            replies += [lm.decode(row) for row in np.asarray(tokens)[:count].tolist()]
        answers = [decide(profile, reply) for profile, reply in zip(profiles, replies, strict=True)]
        self.counts.update(count_answers(answers))
        return answers

    def _batches(self, prompts: Sequence[str], where: str, room: int = 0) -> Iterator[tuple[Any, Any, int]]:
        """Yields (ids, mask, number of real rows) of batches of one size; copies of a row pad the last one."""
        lm = self.language_model
        rows, limit = lm.tokenize([lm.chat(prompt) for prompt in prompts]), lm.model.config.max_position_embeddings
        if (longest := max(map(len, rows), default=1)) + room > limit:
            raise PSAError(f"{where}: {longest} tokens, the model reads {limit - room}; shorten the text")
        if not all(rows):
            raise PSAError(f"{lm.folder}: a prompt has no tokens; the tokenizer does not belong to the model")
        with Progress(len(rows), "prompt", where) as progress:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                length = -(-max(map(len, batch)) // _BUCKET) * _BUCKET
                filled = batch + batch[:1] * (self.batch_size - len(batch))
                yield *pad_left(filled, length), len(batch)
                progress.step(len(batch))


@partial(jax.jit, static_argnames="pooling")
def pooled_states(
    model: Qwen2, input_ids: Int[Array | np.ndarray, "b s"], mask: Bool[Array | np.ndarray, "b s"], pooling: str
) -> Float32[Array, "b d"]:
    """Pools the last hidden states over the tokens where the mask is True, in float32.

    Args:
      model: the language model.
      input_ids: tokens, padded on the left.
      mask: True for real tokens.
      pooling: "mean" or "sum".
    """
    states = model(jnp.asarray(input_ids), jnp.asarray(mask)).last.astype(jnp.float32)
    total = jnp.where(mask[..., None], states, 0.0).sum(axis=1)
    return total / mask.sum(axis=1, keepdims=True).astype(jnp.float32) if pooling == "mean" else total


@partial(jax.jit, static_argnums=(3, 4))
def _generate(model: Qwen2, input_ids, mask, max_new_tokens: int, stop_tokens: tuple[int, ...]):
    return model.generate(
        input_ids, mask, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, pad_token=stop_tokens[0]
    )


def load_qwen_encoder(
    folder: str | Path,
    *,
    template: str | Path | None = None,
    pooling: str = "mean",
    ask_model: bool = False,
    dtype: Any = jnp.float32,
    **settings: int,
) -> QwenEncoder:
    """Makes the encoder from a Qwen2.5 folder in transformers' layout.

    Args:
      folder: of the model.
      template: a text file that replaces the project's own prompt.
      pooling: "mean" or "sum".
      ask_model: ask the model for the banned categories.
      dtype: of the parameters; bfloat16 halves the memory, and the torch original ran in it.
      settings: `batch_size`, `max_new_tokens`.

    Raises:
      PSAError: a bad folder, template or setting.
    """
    text = PROFILE if template is None else read_template(template)
    return QwenEncoder(load_qwen2(folder, dtype=dtype), text, pooling, ask_model, **settings)
