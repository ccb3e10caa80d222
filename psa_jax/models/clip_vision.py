"""CLIP vision encoders (transformers' CLIPVisionModelWithProjection) in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.models.clip import Layers
from psa_jax.models.config import CLIPVisionConfig
from psa_jax.models.norms import layer_norm


class PatchEmbeddings(nnx.Module):
    """Embeddings of square patches, after one of the whole picture, each with a learned position."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.patch_embedding = nnx.Conv(
            3, width, (side, side), strides=side, padding="VALID", use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Embed((config.image_size // side) ** 2 + 1, width, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        """States before the first layer."""
        patches = self.patch_embedding(pixels)
        flat = patches.reshape(len(pixels), -1, patches.shape[-1])
        whole = jnp.broadcast_to(self.class_embedding[...], (len(pixels), 1, flat.shape[-1]))
        return jnp.concatenate([whole, flat], axis=1) + self.position_embedding.embedding[None]


class CLIPVision(nnx.Module):
    """CLIP vision encoder with its projection into the space that it shares with texts.

    Source: arXiv 2103.00020, section 2.4.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = PatchEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)  # sic, as in the files
        self.encoder = Layers(config, causal=False, rngs=rngs)
        self.post_layernorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.visual_projection = nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """Embedding of each picture, not normalised.

        Args:
          pixels: with height and width `config.image_size`, normalised as CLIP's image processor does.
        """
        states = self.pre_layrnorm(self.embeddings(pixels))
        for index, layer in enumerate(self.encoder.layers):
            with jax.named_scope(f"layers_{index}"):
                states = layer(states)
        return self.visual_projection(self.post_layernorm(states[:, 0]))
