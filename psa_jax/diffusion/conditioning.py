"""Conditions of a UNet: text states and, for SDXL, pooled text and picture sizes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter import Adapter
from psa_jax.models.clip import CLIPText


class TextConditions(NamedTuple):
    """Encoded prompts.

    Attributes:
      states: text states for the cross-attentions.
      pooled: projected pooled text of SDXL's second encoder; None for models with one encoder.
    """

    states: Float[Array, "b s c"]
    pooled: Float[Array, "b p"] | None

    def without(self, absent: Bool[Array, " b"]) -> "TextConditions":
        """The conditions with zeros in place of absent prompts, as SDXL base treats a missing negative prompt."""
        return jax.tree.map(lambda leaf: jnp.where(absent.reshape(-1, *(1,) * (leaf.ndim - 1)), 0, leaf), self)


def encode_text(encoders: tuple[CLIPText, ...], ids: tuple[Int[Array, "b s"], ...]) -> TextConditions:
    """Conditions of tokenized prompts.

    SD1.x and SD2.x use the last states of their encoder. SDXL joins the states of both encoders before their last
    layers, and takes the pooled text of the second.

    Args:
      encoders: one, or SDXL's two.
      ids: token ids for each encoder.
    """
    outputs, names = [], ("text_encoder", "text_encoder_2")[: len(encoders)]
    for name, encoder, tokens in zip(names, encoders, ids, strict=True):
        with jax.named_scope(name):
            outputs.append(encoder(tokens))
    if len(outputs) == 1:
        return TextConditions(outputs[0].last, None)
    return TextConditions(jnp.concatenate([out.hidden[-2] for out in outputs], axis=-1), outputs[-1].projected)


def size_ids(size: tuple[int, int], batch: int) -> Float[Array, "b 6"]:
    """SDXL's time ids for generation: original size = target size = (height, width), no crop; one row a prompt."""
    return jnp.tile(jnp.asarray([[*size, 0, 0, *size]], jnp.float32), (batch, 1))


def prompt_gates(
    model: StableDiffusion, adapter: Adapter, prompts: Sequence[str], users: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n k"]:
    """p_k·b_k of each prompt with its user (`models.gates`), by category.

    Args:
      model: base model of the adapter; only its text encoders are read.
      adapter: one with a gate by categories.
      prompts: n of them.
      users: embeddings, one a prompt.
    """
    ids = tuple(jnp.asarray(ids) for ids in model.token_ids(list(prompts)))
    graph, params = nnx.split((model.text_encoders, adapter.gate))
    return np.asarray(_gates(params, ids, jnp.asarray(users, jnp.float32), graph=graph))


@functools.partial(jax.jit, static_argnames="graph")
def _gates(
    params: PyTree[Array], ids: tuple[Int[Array, "n s"], ...], users: Float[Array, "n d"], *, graph: nnx.GraphDef
) -> Float[Array, "n k"]:
    encoders, gate = nnx.merge(graph, params)
    return gate.parts(encode_text(encoders, ids).states, users)
