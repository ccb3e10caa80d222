"""Unified Concept Editing: a base model that draws one concept where another is asked for, in closed form.

Every cross-attention's keys and values become W′ = (λW + Σ W g cᵀ)(λI + Σ c cᵀ)⁻¹ over pairs of a concept c and its
guide g, the text states of their last tokens: as near to W as λ says, and mapping c to what W makes of g. All W′ are W
times one matrix, since each reads the same states. A concept that is its own guide is preserved.

It is a baseline: whoever asks gets the same picture.

Source: R. Gandikota et al., Unified Concept Editing in Diffusion Models (WACV 2024), equation 7.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from psa_jax.csv_input import name_of, read_cells, read_records
from psa_jax.diffusion.conditioning import encode_text
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion

STIFFNESS = 0.5
"""λ of the authors' code."""
_EDITED = ("to_k", "to_v")


class Replacement(NamedTuple):
    """A concept and what is drawn in its place; the same text preserves it."""

    concept: str
    guide: str


def read_replacements(path: Path) -> list[Replacement]:
    """Reads pairs from a CSV file with the columns concept and guide.

    Raises:
      PSAError: a column is missing, a cell is empty, or a concept is there twice.
    """
    readers, found = {"concept": name_of, "guide": name_of}, {}
    for number, cells in read_records(path, ("concept", "guide")):
        each = Replacement(**read_cells(cells, readers, f"{path}, line {number}"))
        if each.concept in found:
            raise PSAError(f"{path}, line {number}: the concept is there already; give each once")
        found[each.concept] = each
    return list(found.values())


def edit_concepts(
    model: StableDiffusion, replacements: Sequence[Replacement], stiffness: float = STIFFNESS
) -> StableDiffusion:
    """The model with the keys and values of its cross-attentions edited; text encoders and VAE are shared.

    Args:
      model: the base model.
      replacements: what to replace and what to preserve.
      stiffness: λ, above zero.

    Raises:
      PSAError: a text that is longer than the text encoder reads.
    """
    texts = sorted({text for pair in replacements for text in pair})
    states = dict(zip(texts, _last_states(model, texts), strict=True))
    concepts, guides = (
        np.stack([states[getattr(pair, side)] for pair in replacements]) for side in Replacement._fields
    )
    rest = stiffness * np.eye(concepts.shape[-1])
    change = np.linalg.solve(rest + concepts.T @ concepts, rest + concepts.T @ guides)
    graph, state = nnx.split(model.unet)
    flat = [
        (path, leaf.replace(jnp.asarray(change @ np.float64(leaf[...]), leaf.dtype)) if _is_edited(path) else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return dataclasses.replace(model, unet=nnx.merge(graph, nnx.from_flat_state(flat)))


def _is_edited(path: tuple[str | int, ...]) -> bool:
    return "attn2" in path and path[-2] in _EDITED and path[-1] == "kernel"


def _last_states(model: StableDiffusion, texts: list[str]) -> Float[np.ndarray, "n c"]:
    """Text states of the last token of each text, the one before the end token."""
    if any(model.truncated(texts)):
        raise PSAError("a concept or guide is longer than the text encoder reads; shorten it")
    graph, params = nnx.split(model.text_encoders)
    ids = tuple(jnp.asarray(each) for each in model.token_ids(texts))
    states = jax.jit(lambda params, ids: encode_text(nnx.merge(graph, params), ids).states)(params, ids)
    ends = [len(each) - 2 for each in model.tokenizer(texts)["input_ids"]]
    return np.float64(np.asarray(states)[np.arange(len(texts)), ends])
