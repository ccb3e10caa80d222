"""Attention and transformer blocks of the diffusers UNet, with the text side computed apart from the image side.

The blocks of one stack are one module whose parameters have a leading axis, and run in a loop that is traced and
compiled once: SDXL has stacks of ten.

A cross-attention sees its text (and user) only through a `CrossContext`. Contexts depend on the prompt and the user but
not on the timestep or the pixel, so a generation computes them once, and in training the policy and the reference share
the text keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.models.conv import CONVOLUTION


def _projections(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    if primitive.name == "conv_general_dilated" or parameters.get("name") == CONVOLUTION:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": _projections,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds stored of a block, the rest of it being computed anew: everything; the results of matrix
products and convolutions; the same without those of attention, which are the largest; nothing but the block's inputs.
"""


def remat(block: Callable[..., Array], name: str, **settings: Any) -> Callable[..., Array]:
    """A module (whose weights become an argument) to be stored for the backward pass as `REMAT[name]` says.

    Args:
      settings: what it is called with besides arrays.
    """

    def call(block: Callable[..., Array], *inputs: Any) -> Array:
        return block(*inputs, **settings)

    if name == "none":
        return lambda *inputs: call(block, *inputs)

    checkpointed = jax.checkpoint(call, policy=REMAT[name])
    return lambda *inputs: checkpointed(block, *inputs)


class UserTokens(NamedTuple):
    """What a cross-attention adds to its answer: s·attn(W_q o or Q, key, value) over T user tokens.

    `query` is None for the `published` kind, which asks with the image query Q itself.
    `key` is None where there is one token: attention over it is the constant `value`.
    """

    key: Float[Array, "b t i"] | None
    value: Float[Array, "b t d"]  # already times the scale s
    query: Float[Array, "i d"] | None = None


class CrossContext(NamedTuple):
    """Keys and values of the text for one cross-attention, and the user tokens if they join after it."""

    key: Float[Array, "b s d"]
    value: Float[Array, "b s d"]
    user: UserTokens | None = None


Attend = Callable[[Float[Array, "b n d"], Float[Array, "b m d"], Float[Array, "b m v"], int], Float[Array, "b n v"]]


def attend(
    query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m v"], heads: int
) -> Float[Array, "b n v"]:
    """softmax(QKᵀ/√d_head)V with heads split and joined; the softmax is in float32."""

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)  # [batch, seq, heads, head_dim]

    head_dim = query.shape[-1] // heads
    logits = jnp.einsum("BNHD,BMHD->BHNM", split(query), split(key), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * head_dim**-0.5, axis=-1).astype(value.dtype)
    out = jnp.einsum("BHNM,BMHD->BNHD", weights, split(value))
    return out.reshape(*out.shape[:2], -1)


class ComputeOptions(NamedTuple):
    """How a UNet computes: it changes speed and memory, and the result only as far as rounding goes."""

    remat: str = "none"  # what training stores of each block for the backward pass, a key of `REMAT`
    attend: Attend = attend  # of self-attention; see `psa_jax.models.fused_attention`


class Attention(nnx.Module):
    """Projections of one attention. `context_dim` None makes it self-attention."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, *, bias: bool = False, rngs: nnx.Rngs):
        self.heads = heads
        source = dim if context_dim is None else context_dim
        self.to_q = nnx.Linear(dim, dim, use_bias=bias, rngs=rngs)
        self.to_k = nnx.Linear(source, dim, use_bias=bias, rngs=rngs)
        self.to_v = nnx.Linear(source, dim, use_bias=bias, rngs=rngs)
        self.to_out_0 = nnx.Linear(dim, dim, rngs=rngs)

    def context(self, states: Float[Array, "b s c"]) -> CrossContext:
        """Keys and values of `states`."""
        return CrossContext(self.to_k(states), self.to_v(states))

    def __call__(
        self, x: Float[Array, "b n d"], context: CrossContext | None = None, attend: Attend = attend
    ) -> Float[Array, "b n d"]:
        context = self.context(x) if context is None else context
        query = self.to_q(x)
        out = attend(query, context.key, context.value, self.heads)
        if context.user is not None:
            out = out + user_attention(query, out, context.user, self.heads)
        return self.to_out_0(out)


def user_attention(
    query: Float[Array, "b n d"], text_output: Float[Array, "b n d"], user: UserTokens, heads: int
) -> Float[Array, "b #n d"]:  # noqa: F821
    """The user tokens' answer to the image (`published`) or to the text attention's answer (`concept`)."""
    if user.key is None:
        return user.value
    query_input = query if user.query is None else text_output @ user.query.T
    return attend(query_input, user.key, user.value, heads)


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x·Φ(x) by erf, as torch does it. jax.nn.gelu's erfc has two branches and takes twice as long on a CPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class GEGLU(nnx.Module):
    """Linear to twice the width, one half gating the other through the exact (erf) GELU."""

    def __init__(self, dim: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(dim, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n i"]:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * gelu(gate)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net_0 = GEGLU(dim, 4 * dim, rngs=rngs)
        self.net_2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.net_2(self.net_0(x))


class LayerNorm(nnx.LayerNorm):
    """Computes in float32, answers in the type of its input."""

    def __call__(self, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
        return super().__call__(x).astype(x.dtype)


class GroupNorm(nnx.GroupNorm):
    """Computes in float32, answers in the type of its input."""

    def __call__(self, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
        return super().__call__(x).astype(x.dtype)


def layer_norm(dim: int, rngs: nnx.Rngs, eps: float = 1e-5) -> LayerNorm:
    # The fast variance E[x²] − E[x]² loses digits that parity needs.
    return LayerNorm(dim, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def group_norm(dim: int, groups: int, rngs: nnx.Rngs, eps: float) -> GroupNorm:
    return GroupNorm(dim, num_groups=groups, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after its LayerNorm and with a residual."""

    def __init__(self, dim: int, heads: int, context_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs)
        self.attn2 = Attention(dim, heads, context_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], context: CrossContext, attend: Attend = attend
    ) -> Float[Array, "b n d"]:
        x = x + self.attn1(self.norm1(x), attend=attend)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """GroupNorm, projection in, `depth` transformer blocks over the pixels, projection out, residual.

    Every parameter of `transformer_blocks` has a leading axis of length `depth`.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int, depth: int, *, groups: int, linear: bool, rngs: nnx.Rngs
    ):
        def projection():
            return nnx.Linear(dim, dim, rngs=rngs) if linear else nnx.Conv(dim, dim, (1, 1), rngs=rngs)

        def block(key):  # the caller's class of Rngs: it may have its own way to make keys
            return BasicTransformerBlock(dim, heads, context_dim, rngs=type(rngs)(key))

        self.depth = depth
        self.norm = group_norm(dim, groups, rngs, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = jax.vmap(block)(jax.random.split(rngs.params(), depth))
        self.proj_out = projection()

    def context(self, text: Float[Array, "b s c"]) -> tuple[CrossContext, ...]:
        """Text keys and values of each block."""
        stacked = jax.vmap(lambda attention: attention.context(text))(self.transformer_blocks.attn2)
        return tuple(
            jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, i, keepdims=False), stacked)  # noqa: B023
            for i in range(self.depth)
        )

    def __call__(
        self, x: Float[Array, "b h w d"], contexts: tuple[CrossContext, ...], compute: ComputeOptions
    ) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape

        def run(block: BasicTransformerBlock, hidden: Array, context: CrossContext) -> Array:
            return remat(block, compute.remat, attend=compute.attend)(hidden, context)

        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, d)
        if self.depth == 1:  # a loop of one step would hide the block from the compiler
            (context,) = contexts
            block = jax.tree.map(lambda leaf: leaf.squeeze(0), self.transformer_blocks)
            hidden = run(block, hidden, context)
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)
            hidden, _ = jax.lax.scan(
                lambda hidden, step: (run(step[0], hidden, step[1]), None),
                hidden,
                (self.transformer_blocks, stacked),
            )
        return x + self.proj_out(hidden.reshape(b, h, w, d))
