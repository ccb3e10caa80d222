"""Conditions of a UNet: text states and, for SDXL, pooled text and picture sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
