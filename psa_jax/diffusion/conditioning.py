"""What a UNet is conditioned on: text states and, for SDXL, pooled text and sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from psa_jax.models.clip import CLIPText


class TextConditions(NamedTuple):
    """Text states for the cross-attentions; pooled text where the model has a second encoder."""

    states: Float[Array, "b s c"]
    pooled: Float[Array, "b p"] | None

    def without(self, absent: Bool[Array, " b"]) -> "TextConditions":
        """Zeros where a prompt is absent: what SDXL base takes for no negative prompt."""
        return jax.tree.map(lambda leaf: jnp.where(absent.reshape(-1, *(1,) * (leaf.ndim - 1)), 0, leaf), self)


def encode_text(encoders: tuple[CLIPText, ...], ids: tuple[Int[Array, "b s"], ...]) -> TextConditions:
    """SD1.x, SD2.x: the last state. SDXL: both encoders' states before their last layer, pooled from the second."""
    outputs = [encoder(tokens) for encoder, tokens in zip(encoders, ids, strict=True)]
    if len(outputs) == 1:
        return TextConditions(outputs[0].last, None)
    return TextConditions(jnp.concatenate([out.hidden[-2] for out in outputs], axis=-1), outputs[-1].projected)


def size_ids(size: tuple[int, int], batch: int) -> Float[Array, "b 6"]:
    """SDXL's time ids of pictures that were neither scaled nor cropped: original size, crop at 0, 0, target size."""
    return jnp.tile(jnp.asarray([[*size, 0, 0, *size]], jnp.float32), (batch, 1))
