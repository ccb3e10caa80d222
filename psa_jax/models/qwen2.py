"""Qwen2 and Qwen2.5 (transformers' Qwen2ForCausalLM) in Flax NNX: states of a prompt, and greedy generation.

The layers are one module whose parameters have a leading axis. A `lax.scan` over it is traced and compiled once.

Source: arXiv 2407.10671, section 2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from psa_jax.errors import PSAError
from psa_jax.models.config import FromJson


@dataclasses.dataclass(frozen=True)
class Qwen2Config(FromJson):
    """Sizes of transformers' Qwen2ForCausalLM with full attention and plain rotary positions.

    Attributes have the names of keys in `config.json` and transformers' defaults for absent keys. `head_dim` None means
    hidden_size // num_attention_heads.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = None

    _fixed = {
        "model_type": ("qwen2",),
        "architectures": (["Qwen2ForCausalLM"], [], None),
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (None, 1, 1.0),
        "is_causal": (True,),
        "is_decoder": (False, None),
        "is_encoder_decoder": (False, None),
        "add_cross_attention": (False, None),
        "pruned_heads": ({}, None),
    }

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str = "config.json") -> "Qwen2Config":
        """Configuration of a parsed `config.json`; arguments and errors as `FromJson.from_json`."""
        # Of both keys transformers takes `rope_scaling`, the older name.
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope, values = config.get(key), dict(config)
        if rope is not None:
            theta = _plain_rope(rope, f"{where}: {key}").get("rope_theta")
            if theta is not None and values.setdefault("rope_theta", theta) != theta:
                raise PSAError(f"{where}: rope_theta = {values['rope_theta']!r}, but {key} has {theta!r}")
        if values.get("num_key_value_heads", 0) is None:
            values["num_key_value_heads"] = values.get("num_attention_heads", cls.num_attention_heads)
        made = super().from_json(values, where)
        made._require_full_attention(values, where)
        return made

    def _require_full_attention(self, config: Mapping[str, Any], where: str) -> None:
        """Refuses a model with another attention in some layer, such as a sliding window that is in use."""
        layers, layer_types = self.num_hidden_layers, config.get("layer_types")
        if layer_types is not None:  # transformers then ignores the keys below
            if layer_types != ["full_attention"] * layers:
                raise PSAError(
                    f"{where}: layer_types = {layer_types!r} is not supported (only full_attention, each layer)"
                )
        elif config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None:
            first = config.get("max_window_layers", 28)
            if type(first) is not int or first < layers:
                raise PSAError(
                    f"{where}: use_sliding_window = {config['use_sliding_window']!r} is not supported: with "
                    f"max_window_layers = {first!r} of {layers} layers the window is in use (only full attention)"
                )

    @property
    def head_width(self) -> int:
        """Width of one head's query, key and value."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads are not divisible by {self.num_key_value_heads} key heads"
            )
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(f"a head is {self.head_width} wide: rotary positions need an even width")


def _plain_rope(rope: Any, where: str) -> Mapping[str, Any]:
    """Rotary parameters of the default type. Further keys in them are ignored, as in transformers.

    Args:
      rope: value of `rope_scaling` or `rope_parameters`.
      where: names it in the error.

    Raises:
      PSAError: another type, such as a scaled rotation.
    """
    if isinstance(rope, Mapping):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type == "default" and rope.get("partial_rotary_factor", 1) in (None, 1):
            return rope
    raise PSAError(f"{where} = {rope!r} is not supported (only rope_type 'default')")


class KeyValue(NamedTuple):
    """Keys, already rotated to their positions, and values of one layer, or stacked over all layers."""

    key: Float[Array, "*layers b m k h"]
    value: Float[Array, "*layers b m k h"]


class Rotation(NamedTuple):
    """Cosine and sine of the angles of rotary positions, each for half a head's width."""

    cos: Float32[Array, "b n h"]
    sin: Float32[Array, "b n h"]


def rotation(positions: Int[Array, "b n"], head_width: int, theta: float) -> Rotation:
    """Rotary angles position · theta^(−2i/head_width), i = 0 … head_width/2 − 1, in float32.

    Args:
      positions: of each token in its prompt, from 0.
      head_width: even.
      theta: base of the frequencies.

    Source: arXiv 2104.09864, equation 15.
    """
    frequencies = np.float32(theta ** -(np.arange(0, head_width, 2) / head_width))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b n k h"], by: Rotation) -> Float[Array, "b n k h"]:
    """Rotary position embedding (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin) of the halves of each head.

    Args:
      x: queries or keys of n tokens and k heads, each h wide.
      by: angles of the tokens.

    Returns:
      The rotated vectors, computed in float32, in the type of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]  # the same for every head
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS norm scale · x / √(mean(x²) + eps) with statistics in float32. Source: arXiv 1910.07467, equation 4."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Normalized states in the type of `x`."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.scale[None, None] * normed.astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention in which groups of query heads share a key and a value head. Source: arXiv 2305.13245."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.head_width = config.head_width
        width, shared = (n * config.head_width for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nnx.Linear(config.hidden_size, width, rngs=rngs)
        self.k_proj = nnx.Linear(config.hidden_size, shared, rngs=rngs)
        self.v_proj = nnx.Linear(config.hidden_size, shared, rngs=rngs)
        self.o_proj = nnx.Linear(width, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        angles: Rotation,
        allowed: Bool[Array, "b n m"],
        cache: KeyValue | None,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "b n d"], KeyValue]:
        """Attention output of n tokens, and the updated cache.

        Args:
          x: states of the tokens.
          angles: of their positions.
          allowed: whether a token (n) attends to a place of the cache (m), or to a token of `x` without a cache.
          cache: keys and values of earlier tokens; None for the first call.
          start: place in the cache where those of `x` go.

        Returns:
          The output, and the keys and values it was computed from.
        """
        b, n, _ = x.shape
        query, key, value = (
            projection(x).reshape(b, n, -1, self.head_width) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = KeyValue(rotate(key, angles), value)
        if cache is not None:
            seen = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1), cache, seen
            )
        query = rotate(query, angles).reshape(b, n, value.shape[2], -1, self.head_width)  # [b, n, shared, group, h]
        logits = jnp.einsum("BNKGH,BMKH->BKGNM", query, seen.key, preferred_element_type=jnp.float32)
        # Not −inf: a padding token may attend to nothing, and a softmax over nothing is NaN.
        logits = jnp.where(allowed[:, None, None], logits * self.head_width**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(seen.value.dtype)
        return self.o_proj(jnp.einsum("BKGNM,BMKH->BNKGH", weights, seen.value).reshape(b, n, -1)), seen


class MLP(nnx.Module):
    """Feed-forward layer SwiGLU: W_down(silu(W_gate x) · W_up x). Source: arXiv 2002.05202, equation 6."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """New states of n tokens, without the residual."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Decoder layer: self-attention and feed-forward, each with an RMSNorm and a residual."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, angles, allowed, cache, start):
        """New states of n tokens, and the updated cache; arguments as `Attention.__call__`."""
        attended, seen = self.self_attn(self.input_layernorm(x), angles, allowed, cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), seen


class Prefill(NamedTuple):
    """Outputs for a batch of prompts.

    Attributes:
      last: final norm of the last layer's states; without meaning at padding.
      cache: keys and values [layers, batch, seq, key heads, head width].
    """

    last: Float[Array, "b s d"]
    cache: KeyValue


class Qwen2(nnx.Module):
    """Causal language model. Every parameter of `transformer_blocks` has a leading axis over the layers."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        def layer(key):  # the caller's class of Rngs: it may have its own way to make keys
            return DecoderLayer(config, rngs=type(rngs)(key))

        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.transformer_blocks = jax.vmap(layer)(jax.random.split(rngs.params(), config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)
        )

    def __call__(self, input_ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Prefill:
        """States of a batch of prompts.

        Args:
          input_ids: token ids, padded on either side.
          mask: False at padding.
        """
        causal = jnp.tril(jnp.ones((mask.shape[1],) * 2, dtype=bool))
        positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
        return Prefill(*self._layers(input_ids, positions, causal[None] & mask[:, None]))

    def logits(self, hidden: Float[Array, "b n d"]) -> Float32[Array, "b n v"]:
        """Logits of the next token over the vocabulary, from `Prefill.last` or a part of it."""
        kernel = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.einsum("BND,DV->BNV", hidden, kernel, preferred_element_type=jnp.float32)

    def _layers(self, input_ids, positions, allowed, cache=None, start=0):
        angles = rotation(positions, self.config.head_width, self.config.rope_theta)
        start = jnp.asarray(start, jnp.int32)
        # `take` makes the states of an id beyond the vocabulary NaN; indexing would take the last token's.
        states = jnp.take(self.embed_tokens.embedding[...], input_ids, axis=0)
        states, cache = jax.lax.scan(
            lambda x, step: step[0](x, angles, allowed, step[1], start), states, (self.transformer_blocks, cache)
        )
        return self.norm(states), cache

    def generate(
        self,
        input_ids: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        *,
        max_new_tokens: int,
        stop_tokens: tuple[int, ...],
        pad_token: int,
    ) -> Int[Array, "b {max_new_tokens}"]:
        """Greedy continuation of prompts.

        Args:
          input_ids: token ids, padded on the left.
          mask: False at padding.
          max_new_tokens: largest number of new tokens.
          stop_tokens: each ends its row. The loop ends with the last row.
          pad_token: fills up ended rows.

        Returns:
          New tokens of each row, up to its stop token and with it, then `pad_token`.
        """
        b, s = input_ids.shape
        prefill = self(input_ids, mask)
        room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
        cache = jax.tree.map(lambda leaf: jnp.pad(leaf, room), prefill.cache)
        lengths = mask.sum(axis=1, dtype=jnp.int32)[:, None]
        stops = jnp.asarray(stop_tokens, jnp.int32)

        def greedy(hidden):
            return jnp.argmax(self.logits(hidden)[:, -1], axis=-1).astype(jnp.int32)

        def unfinished(state):
            step, _, done, *_ = state
            return (step < max_new_tokens) & ~done.all()

        def one(state):
            step, token, done, out, cache = state
            out = out.at[:, step].set(jnp.where(done, pad_token, token))
            done = done | jnp.isin(token, stops)
            new = jnp.broadcast_to(jnp.arange(max_new_tokens)[None] <= step, (b, max_new_tokens))
            allowed = jnp.concatenate([mask, new], axis=1)[:, None]
            hidden, cache = self._layers(token[:, None], lengths + step, allowed, cache, s + step)
            return step + 1, greedy(hidden), done, out, cache

        out = jnp.full((b, max_new_tokens), pad_token, jnp.int32)
        state = (jnp.int32(0), greedy(prefill.last[:, -1:]), jnp.zeros(b, bool), out, cache)
        return jax.lax.while_loop(unfinished, one, state)[3]
