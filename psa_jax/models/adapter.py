"""The user adapter: a profile embedding becomes T user tokens, and these join every cross-attention.

    z = LayerNorm(reshape(W_p u + b_p, [T, C]))

The adapter's kind says how. With o the text attention's output, e the text states and s the scale:

    published   o + s·attn(Q, W_k z, W_v z)                     Source: PSA, arXiv 2508.01151
    text        attn(Q, K, V + s·attn(W_q e, W_k z, W_v z))
    concept     o + s·attn(W_q o, W_k z, W_v z)
    prompt      e + s·W_o attn(W_q e, W_k z, W_v z), before the UNet
    rewrite     attn(Q, K, V + s·g·W_o gelu(W_1 e))         g = attn(W_q e, W_k z, W_v z), one number a head
    edit        e + s·g·(W_o gelu(W_1 m + b_1) + b_o), before the UNet, with the same g, or that of
                `psa_jax.models.gates`; m is e, or with `mixing` e + W_mo attn(W_mq n, W_mk [n, z], W_mv [n, z]) with
                n = e of mean 0 and variance 1, so that a token knows the whole prompt

With `pooled`, edit changes SDXL's pooled text q, too, which reaches the UNet through its timestep embedding:

    q + s·g_q·(W_p2 gelu(W_p1 n + b_p1) + b_p2)                n = q with mean 0 and variance 1

g_q is the gate by categories; of the attention's gates, the largest over the tokens, for each head and its part of the
numbers: what is banned stands in a few tokens of the prompt, and a mean would mostly be that of padding. n and not q,
since W_p1 is made for numbers of variance 1, and the length of q depends on the text encoder.

The first four write what the user tokens hold; the last two say what stands in the place of a concept, and the user
decides whether. W_v (W_o and W_p2, where they are) starts at zero, so an untrained adapter leaves the base model
exactly as it is. With a single token, attention is the constant W_v z, and W_q and W_k do not exist.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.errors import PSAError
from psa_jax.models.adapter_config import MIXING, POOLED, AdapterConfig, Projection
from psa_jax.models.attention import CrossContext, UserTokens, attend, gelu
from psa_jax.models.gates import CategoryGate, combine
from psa_jax.models.unet import UNet

LAYER_NORM_EPS = 1e-5
# Text states of different tokens are much alike. With a gain of 1 all prompt tokens attend to the user tokens nearly
# alike at the start, and training takes a little longer to separate concepts.
QUERY_KEY_GAIN = 1.5


class AdapterParam(nnx.Param):
    """A parameter that training changes. The base model's parameters are plain `nnx.Param`s and stay frozen."""


class UserProjection(nnx.Module):
    """Projection of a user embedding to T user tokens z = LayerNorm(reshape(W_p u + b_p, [T, C]))."""

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        inner = config.tokens * config.cross_dim
        self.tokens = config.tokens
        self.kernel = AdapterParam(_init(rngs, config.user_dim, inner))  # [D, T·C]
        self.bias = AdapterParam(jnp.zeros(inner))
        self.norm_scale = AdapterParam(jnp.ones(config.cross_dim))
        self.norm_bias = AdapterParam(jnp.zeros(config.cross_dim))

    def __call__(self, user: Float[Array, "b d"]) -> Float[Array, "b t c"]:
        """User tokens [batch, T, C] of user embeddings [batch, D]."""
        tokens = (user @ self.kernel[...] + self.bias[...][None, :]).reshape(user.shape[0], self.tokens, -1)
        # The fast variance E[x²] − E[x]² loses digits where a learned mean is large against the spread.
        normal = jax.nn.standardize(tokens, axis=-1, epsilon=LAYER_NORM_EPS, algorithm="stable")
        return normal * self.norm_scale[...][None, None, :] + self.norm_bias[...][None, None, :]


class UserAttention(nnx.Module):
    """Projections of one adapter site: kernels [in, out], and biases where they have one; those it lacks are None.

    Args:
      projections: as `AdapterConfig.projections` gives them.
      zeros: names of the projections that start at zero.
    """

    def __init__(self, projections: dict[str, Projection], zeros: tuple[str, ...], *, rngs: nnx.Rngs):
        def kernel(name):
            if name not in projections:
                return None
            gain, (inner, outer, _) = QUERY_KEY_GAIN if name in ("to_q", "to_k") else 1.0, projections[name]
            return AdapterParam(jnp.zeros((inner, outer)) if name in zeros else _init(rngs, inner, outer, gain))

        def bias(name):
            has_one = name in projections and projections[name].bias
            return AdapterParam(jnp.zeros(projections[name].outer)) if has_one else None

        self.to_q, self.to_k, self.to_v, self.to_out = map(kernel, ("to_q", "to_k", "to_v", "to_out"))
        self.hidden = kernel("hidden")
        self.mix_q, self.mix_k, self.mix_v, self.mix_out = map(kernel, MIXING)
        self.hidden_bias, self.to_out_bias = bias("hidden"), bias("to_out")
        self.pooled_hidden, self.pooled_out = map(kernel, POOLED)
        self.pooled_hidden_bias, self.pooled_out_bias = map(bias, POOLED)


def _init(rngs: nnx.Rngs, fan_in: int, fan_out: int, gain: float = 1.0) -> Float[Array, "i o"]:
    normal = jax.nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
    return normal(rngs.params(), (fan_in, fan_out))


Scale = Float[Array, " b"]
"""Strength s of the adapter for each prompt; 0 is the base model."""


def _user_attention(
    layer: UserAttention, query_input: Float[Array, "b n c"], z: Float[Array, "b t c"], heads: int
) -> Float[Array, "b #n d"]:  # noqa: F821
    """attn(W_q x, W_k z, W_v z) with x = `query_input`; the constant W_v z for a single token."""
    value = z @ layer.to_v[...]
    if layer.to_k is None:
        return value
    return attend(query_input @ layer.to_q[...], z @ layer.to_k[...], value, heads)


def _rewrite(
    layer: UserAttention, text: Float[Array, "b s c"], z: Float[Array, "b t c"], heads: int
) -> Float[Array, "b s d"]:
    """g·(W_o gelu(W_1 m + b_1) + b_o): each head's part of the new states times its gate."""
    gates = _user_attention(layer, text, z, heads)  # [b, s or 1, heads]
    states = _states(layer, _mixed(layer, text, z, heads))
    by_head = states.reshape(*states.shape[:2], heads, -1)
    return (gates[..., None] * by_head).reshape(states.shape)


def _states(layer: UserAttention, text: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
    """W_o gelu(W_1 m + b_1) + b_o."""

    def linear(x, kernel, bias):
        return x @ kernel[...] if bias is None else x @ kernel[...] + bias[...][None, None, :]

    return linear(gelu(linear(text, layer.hidden, layer.hidden_bias)), layer.to_out, layer.to_out_bias)


def _mixed(
    layer: UserAttention, text: Float[Array, "b s c"], z: Float[Array, "b t c"] | None, heads: int
) -> Float[Array, "b s c"]:
    """The states m that the hidden layer sees: e, or e and what a self-attention over e and user tokens adds to it."""
    if layer.mix_q is None:
        return text
    # The last but one states, which SDXL takes, have a token that is hundreds of times as long as the others.
    normal = jax.nn.standardize(text.astype(jnp.float32), axis=-1, epsilon=LAYER_NORM_EPS, algorithm="stable")
    normal = normal.astype(text.dtype)
    seen = normal if z is None else jnp.concatenate([normal, z], axis=1)
    found = attend(normal @ layer.mix_q[...], seen @ layer.mix_k[...], seen @ layer.mix_v[...], heads)
    return text + found @ layer.mix_out[...]


def _apply_published(layer, context, text, z, heads, scale):
    key = None if layer.to_k is None else z @ layer.to_k[...]
    return context._replace(user=UserTokens(key, scale[:, None, None] * (z @ layer.to_v[...])))


def _apply_text(layer, context, text, z, heads, scale):
    return context._replace(value=context.value + scale[:, None, None] * _user_attention(layer, text, z, heads))


def _apply_rewrite(layer, context, text, z, heads, scale):
    return context._replace(value=context.value + scale[:, None, None] * _rewrite(layer, text, z, heads))


def _apply_concept(layer, context, text, z, heads, scale):
    value = scale[:, None, None] * (z @ layer.to_v[...])
    if layer.to_k is None:
        return context._replace(user=UserTokens(None, value))
    return context._replace(
        user=UserTokens(z @ layer.to_k[...], value, layer.to_q[...].T)
    )  # UserTokens holds [out, in]


_APPLY: dict[str, Callable[..., CrossContext]] = {
    "published": _apply_published,
    "text": _apply_text,
    "concept": _apply_concept,
    "rewrite": _apply_rewrite,
}
"""Adapter kind -> (layer, context, text, z, heads, scale) -> context, for the kinds that act in cross-attentions."""


class Adapter(nnx.Module):
    """User adapter: the user projection and a `UserAttention` for each adapter site. Holds all trained parameters.

    Source: PSA, arXiv 2508.01151, for the kind `published`.
    """

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        self.config = config
        # One of the two says which user it is for.
        if config.by_categories:
            self.gate = CategoryGate(config.user_dim, config.cross_dim, AdapterParam, rngs=rngs)
        else:
            self.user_proj = UserProjection(config, rngs=rngs)
        self.layers = nnx.List(
            [UserAttention(config.projections(*site), config.zero_kernels, rngs=rngs) for site in config.adapter_sites]
        )

    def __repr__(self) -> str:
        config = self.config
        what = "gate by categories" if config.by_categories else f"{config.tokens} user tokens"
        return (
            f"Adapter({config.kind}, {what}, users of {config.user_dim} numbers, {len(config.layers)} cross-attentions)"
        )

    @jax.named_scope("adapter")
    def __call__(
        self,
        unet: UNet,
        text: Float[Array, "b s c"],
        user: Float[Array, "b d"],
        scale: Scale,
        base: tuple[CrossContext, ...] | None = None,
    ) -> tuple[CrossContext, ...]:
        """Cross-attention contexts of the UNet with the adapter in them. They do not depend on the timestep.

        User tokens are computed in the parameters' type, everything else in the type of `text`. An adapter with
        `config.pooled` changes the pooled text as well: call `edit_pooled`, too.

        Args:
          unet: the base model's.
          text: text states of each prompt.
          user: one user embedding a prompt.
          scale: strength s of each prompt; 0 is the base model.
          base: `unet.context(text)`, where it is already computed.

        Returns:
          One context for each cross-attention, in adapter order.
        """
        if self.config.before_unet:
            return unet.context(self.edit(text, user, scale))
        z, layers, scale = self._tokens(user, text), self._layers_like(text), scale.astype(text.dtype)
        base = unet.context(text) if base is None else base
        apply = _APPLY[self.config.kind]
        with jax.named_scope("user_contexts"):
            return tuple(
                apply(layer, context, text, z, heads, scale)
                for layer, context, (_, heads) in zip(layers, base, self.config.layers, strict=True)
            )

    def edit(self, text: Float[Array, "b s c"], user: Float[Array, "b d"], scale: Scale) -> Float[Array, "b s c"]:
        """New text states, of the kinds that act before the UNet.

        Args:
          text, user, scale: as for the adapter itself.
        """
        (layer,), ((_, heads),) = self._layers_like(text), self.config.adapter_sites
        if self.config.by_categories:
            gates = self._category_gates(text, user)[:, None, None]
            added = gates * _states(layer, _mixed(layer, text, None, heads))
        elif self.config.rewrites:
            added = _rewrite(layer, text, self._tokens(user, text), heads)
        else:
            added = _user_attention(layer, text, self._tokens(user, text), heads) @ layer.to_out[...]
        return text + scale.astype(text.dtype)[:, None, None] * added

    @jax.named_scope("adapter/pooled")
    def edit_pooled(
        self, pooled: Float[Array, "b p"] | None, text: Float[Array, "b s c"], user: Float[Array, "b d"], scale: Scale
    ) -> Float[Array, "b p"] | None:
        """New pooled text, of adapters with `config.pooled`; others give back what they are given.

        Args:
          pooled: pooled text of each prompt; None for models without one.
          text: text states as they are without the adapter, which the gate reads.
          user, scale: as for the adapter itself.

        Raises:
          PSAError: an adapter for a pooled text, and none or one of another width.
        """
        if not self.config.pooled:
            return pooled
        if pooled is None or pooled.shape[-1] != self.config.pooled:
            found = "none" if pooled is None else f"one of {pooled.shape[-1]}"
            raise PSAError(
                f"the adapter edits a pooled text of {self.config.pooled} numbers, the base model has {found}"
            )
        (layer,) = self._layers_like(pooled)
        gates = self._pooled_gates(text, user).astype(pooled.dtype)
        normal = jax.nn.standardize(pooled.astype(jnp.float32), axis=-1, epsilon=LAYER_NORM_EPS, algorithm="stable")
        hidden = gelu(normal.astype(pooled.dtype) @ layer.pooled_hidden[...] + layer.pooled_hidden_bias[...][None, :])
        made = hidden @ layer.pooled_out[...] + layer.pooled_out_bias[...][None, :]
        by_head = made.reshape(len(made), gates.shape[-1], -1)
        added = (gates[..., None] * by_head).reshape(made.shape)
        return pooled + scale.astype(pooled.dtype)[:, None] * added

    def _pooled_gates(self, text: Float[Array, "b s c"], user: Float[Array, "b d"]) -> Float[Array, "b h"]:
        """The gate by categories, or the largest of the attention's gates over the tokens, for each head."""
        if self.config.by_categories:
            return self._category_gates(text, user)[:, None]
        (layer,), ((_, heads),) = self._layers_like(text), self.config.adapter_sites
        return jnp.max(_user_attention(layer, text, self._tokens(user, text), heads), axis=1)

    def _category_gates(self, text: Float[Array, "b s c"], user: Float[Array, "b d"]) -> Float[Array, " b"]:
        with jax.named_scope("gate"):
            # Fitted before the steps, which leave it alone.
            return jax.lax.stop_gradient(combine(self.gate.parts(text, user))).astype(text.dtype)

    def _tokens(self, user: Float[Array, "b d"], text: Float[Array, "b s c"]) -> Float[Array, "b t c"]:
        # User embeddings differ little: W_p and its norm are not rounded to the type of the text.
        with jax.named_scope("user_projection"):
            return self.user_proj(user).astype(text.dtype)

    def _layers_like(self, text: Float[Array, "..."]) -> nnx.List:
        return jax.tree.map(lambda leaf: leaf.astype(text.dtype), self.layers)
