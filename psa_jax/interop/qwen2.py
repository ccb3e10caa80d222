"""Qwen2 and Qwen2.5 folders in transformers' layout: configuration, safetensors weights, tokenizer, chat template."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int

from psa_jax.errors import PSAError
from psa_jax.interop.parts import open_tokenizer
from psa_jax.interop.weights import (
    Shardings,
    Tensor,
    Tensors,
    abstract_model,
    find_weights,
    load_weights,
    open_tensors,
    shards_of,
)
from psa_jax.json_input import read_json
from psa_jax.models.qwen2 import Qwen2, Qwen2Config

_HEAD, _EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Language model with its tokenizer.

    Attributes:
      folder: its source.
      stop_tokens: tokens that end a reply, of generation_config.json or else of config.json.
      weights: the safetensors file, or the index of sharded ones.
    """

    folder: Path
    model: Qwen2
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    weights: Path

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over loaded parameters, configurations, tokenizer and chat template.

        The layout of the files (number, type, order, metadata) does not change it.
        """
        digest = hashlib.sha256(b"values as loaded")
        flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(self.model))}
        for name in sorted(flat):
            values = np.asarray(flat[name][...])
            digest.update(json.dumps([name, values.shape]).encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return self._with_settings(digest)

    @cached_property
    def files_fingerprint(self) -> str:
        """sha256 over the bytes of the weight files and the settings, as earlier versions wrote into tables."""
        digest = hashlib.sha256()
        for path in _files(self.weights):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return self._with_settings(digest)

    def _with_settings(self, digest: Any) -> str:
        dtype = self.model.norm.scale.dtype.name
        settings = (dtype, self.model.config, self.stop_tokens, self.tokenizer.chat_template)
        digest.update(repr(settings).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    def chat(self, text: str) -> str:
        """Text as a user's message in the folder's chat template; unchanged if the folder has none.

        Raises:
          PSAError: the template fails.
        """
        if self.tokenizer.chat_template is None:
            return text
        messages = [{"role": "user", "content": text}]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which can fail in any way
            reason = " ".join(str(error).split())[:200]
            raise PSAError(f"{self.folder}: its chat template fails ({reason}); download the folder again") from error

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without truncation."""
        # Callers check lengths themselves: the tokenizer would only warn.
        return self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply before its first stop token."""
        ends = [i for i, token in enumerate(tokens) if token in self.stop_tokens]
        return self.tokenizer.decode(list(tokens)[: ends[0] if ends else None], skip_special_tokens=True)


def pad_left(
    rows: Sequence[Sequence[int]], length: int, pad_token: int = 0
) -> tuple[Int[np.ndarray, "n s"], Bool[np.ndarray, "n s"]]:
    """Rows of token ids padded on the left.

    Args:
      rows: token ids, at most `length` each.
      length: of the padded rows.
      pad_token: fills up.

    Returns:
      Token ids in int32, and a mask that is False at padding.
    """
    ids = np.full((len(rows), length), pad_token, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = True
    return ids, mask


def load_qwen2(folder: str | Path, *, dtype: Any = jnp.float32, sharding: Shardings | None = None) -> LanguageModel:
    """Reads a folder: all settings first, with their checks, then the weights one tensor at a time.

    Args:
      folder: in transformers' layout.
      dtype: of every parameter, independent of the files' type.
      sharding: (path, shape) of a parameter -> its sharding; each process reads only its own parts.

    Raises:
      PSAError: a missing file, another kind of model, or weights that do not match config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PSAError(f"{folder}: no such model folder; give a Qwen2.5 folder in transformers' layout")
    config = Qwen2Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    tokenizer = _read_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise PSAError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, vocab_size is {config.vocab_size}")
    weights = find_weights(folder, "model", advice="download those without .{} in their names")
    config, tensors = _tied(config, open_tensors(weights).renamed(qwen2_name))
    model = load_weights(abstract_model(Qwen2, config), tensors, dtype=dtype, sharding=sharding)
    return LanguageModel(folder, model, tokenizer, _stop_tokens(folder, config), weights)


def qwen2_name(name: str) -> str:
    """Parameter name of a tensor in the file."""
    return re.sub(r"^layers\.", "transformer_blocks.", name.removeprefix("model."))


def _tied(config: Qwen2Config, tensors: Tensors) -> tuple[Qwen2Config, Tensors]:
    """Configuration and tensors with a head only where it differs from the embeddings.

    As in transformers: the file of a tied model has the head, the embeddings, or both if they are equal. If they
    differ, the model is not tied, even if config.json says so.
    """
    by_name = dict(tensors.by_name)
    if not config.tie_word_embeddings or _HEAD not in by_name:
        return config, tensors
    head = by_name.pop(_HEAD)
    if _EMBEDDINGS not in by_name:
        by_name[_EMBEDDINGS] = head
    elif not _are_equal(head, by_name[_EMBEDDINGS]):
        return dataclasses.replace(config, tie_word_embeddings=False), tensors
    return config, Tensors(tensors.where, by_name)


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices are equal. Compared in parts: each has a gigabyte in a large model."""
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    rows = (slice(start, start + 4096) for start in range(0, first.shape[0], 4096))
    return all(np.array_equal(first.read((part, slice(None))), second.read((part, slice(None)))) for part in rows)


def _files(weights: Path) -> list[Path]:
    if weights.suffix != ".json":
        return [weights]
    return [weights.parent / name for name in shards_of(weights)]


def _stop_tokens(folder: Path, config: Qwen2Config) -> tuple[int, ...]:
    source, tokens = "config.json", config.eos_token_id
    if (folder / "generation_config.json").is_file():
        source = "generation_config.json"
        tokens = read_json(folder / source).get("eos_token_id", tokens)
    tokens = () if tokens is None else tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)
    for token in tokens:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise PSAError(f"{folder / source}: eos_token_id {token!r} is not a token below {config.vocab_size}")
    return tokens


def _read_tokenizer(folder: Path):
    from transformers import Qwen2Tokenizer  # imported late: slow to import

    if not (folder / "tokenizer.json").is_file():  # otherwise transformers would make an empty tokenizer
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise PSAError(
                    f"{folder / name}: file not found; a tokenizer is tokenizer.json or vocab.json, merges.txt"
                )
    return open_tokenizer(Qwen2Tokenizer, "Qwen2", folder)
