"""CLIP text encoders (transformers' CLIPTextModel, CLIPTextModelWithProjection) in Flax NNX.

The layers are those of the vision tower, too (`psa_jax.models.clip_vision`), which attends in both directions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.models.attention import gelu
from psa_jax.models.config import CLIPTextConfig, CLIPVisionConfig
from psa_jax.models.norms import layer_norm

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


class SelfAttention(nnx.Module):
    """Multi-head self-attention over tokens, causal or in both directions. The softmax is in float32."""

    def __init__(self, dim: int, heads: int, causal: bool = True, *, rngs: nnx.Rngs):
        self.heads, self.causal = heads, causal
        self.q_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.k_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.v_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.out_proj = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Attention output of each token."""
        b, s, d = x.shape
        query, key, value = (
            p(x).reshape(b, s, self.heads, d // self.heads) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        with jax.named_scope("attention"):
            logits = jnp.einsum("BNHD,BMHD->BHNM", query, key, preferred_element_type=jnp.float32)
            logits = logits * (d // self.heads) ** -0.5
            if self.causal:
                logits = jnp.where(jnp.tril(jnp.ones((s, s), dtype=bool))[None, None], logits, -jnp.inf)
            weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
            out = jnp.einsum("BHNM,BMHD->BNHD", weights, value).reshape(b, s, d)
        return self.out_proj(out)


class MLP(nnx.Module):
    """Feed-forward layer: two linear layers with the activation `config.hidden_act` between them."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.act = config.hidden_act
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """New states of each token, without the residual."""
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Transformer layer: self-attention and feed-forward, each with a LayerNorm and a residual."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool = True, *, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """New states of each token."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextOutput(NamedTuple):
    """Outputs of a text encoder.

    Attributes:
      hidden: states after the embeddings and after each layer, without the final norm.
      last: final norm of the last layer's states: the text states of SD1.x and SD2.x.
      pooled: `last` at the end-of-text token.
      projected: projection of `pooled`; None where the model has no projection.
    """

    hidden: tuple[Float[Array, "b s d"], ...]
    last: Float[Array, "b s d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b p"] | None


class Embeddings(nnx.Module):
    """Sum of a learned token embedding and a learned position embedding."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Embedding of each token id."""
        position = self.position_embedding.embedding[None, : input_ids.shape[1]]
        # nnx.Embed returns the type it was constructed with, not that of weights loaded later.
        return self.token_embedding(input_ids).astype(position.dtype) + position


class Layers(nnx.Module):
    """The list of transformer layers, as a module of its own so that parameter names match transformers'."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool = True, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(config, causal, rngs=rngs) for _ in range(config.num_hidden_layers)])


class CLIPText(nnx.Module):
    """CLIP text encoder with causal attention and no padding mask, as Stable Diffusion uses it.

    Source: arXiv 2103.00020, section 2.4.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Layers(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.text_projection = (
            None
            if config.projection_dim is None
            else nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
        )

    def __call__(self, input_ids: Int[Array, "b s"]) -> TextOutput:
        """States of tokens.

        Args:
          input_ids: with the start token first and an end-of-text token, padded to any length.
        """
        hidden = [self.embeddings(input_ids)]
        for index, layer in enumerate(self.encoder.layers):
            with jax.named_scope(f"layers_{index}"):
                hidden.append(layer(hidden[-1]))
        last = self.final_layer_norm(hidden[-1])
        # Configs from before transformers 4.29 say eos_token_id 2 and mean "the highest id".
        ends = input_ids if self.config.eos_token_id == 2 else (input_ids == self.config.eos_token_id)
        position = jnp.argmax(ends.astype(jnp.int32), axis=-1)
        pooled = jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0]
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return TextOutput(tuple(hidden), last, pooled, projected)
