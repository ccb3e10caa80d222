"""Attention and transformer blocks of the diffusers UNet. Text keys and values are computed apart from the image.

The blocks of one stack are one module whose parameters have a leading axis. A `lax.scan` over that axis is traced and
compiled once; SDXL has stacks of ten blocks.

A cross-attention sees the text and the user only through a `CrossContext`. Contexts depend on the prompt and the user,
not on the timestep or the pixel. Generation computes them once for all steps, and in training the policy and the
reference share the text keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.models.conv import CONVOLUTION, PixelwiseConv
from psa_jax.models.norms import group_norm, layer_norm

KERNEL = "attention_kernel"
"""Name that a kernel gives to what its backward pass needs, for `REMAT`."""
_CUDNN = "dot_product_attention_fwd_wrapper"  # cuDNN's kernel, which gives no names


def _projections(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Checkpoint policy: whether a result is one of a convolution, a matrix product with weights or a kernel."""
    if primitive.name in ("conv_general_dilated", _CUDNN) or parameters.get("name") in (CONVOLUTION, KERNEL):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)


def _kernels(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Checkpoint policy: whether a result is one of a kernel of attention."""
    return primitive.name == _CUDNN or parameters.get("name") == KERNEL


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy: whether a result is no gathered weight. A block has no other barrier and constraint."""
    return primitive.name not in ("optimization_barrier", "sharding_constraint")


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": _projections,
    "kernels": _kernels,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""Rematerialization policies, by what the backward pass finds stored: `none` stores everything; `dots` the outputs of
matrix products and convolutions; `projections` the same without attention's products (the largest), but with what
a kernel of attention gives in their place; `kernels` the block's inputs and what these kernels give; `full` only the
block's inputs."""


def remat(function: Callable[..., Any], compute: "ComputeOptions", **settings: Any) -> Callable[..., Any]:
    """A function of a module and arrays, with the rematerialization policy `REMAT[compute.remat]`.

    The module's weights are an argument of `jax.checkpoint`, not closed over. Where they are divided, devices gather
    them when the module runs, and again for its backward pass.

    Args:
      function: maps a module and arrays to arrays.
      compute: the policy, and how weights are gathered.
      settings: keyword arguments of the function that are no arrays.

    Returns:
      A function of the module and the arrays.
    """

    def call(module: nnx.Module, *inputs: Any) -> Any:
        if compute.whole is not None:
            # Not before the inputs are there: the compiler would gather all modules at once, and keep them.
            module, inputs = jax.lax.optimization_barrier((module, inputs))
            module = jax.tree.map(compute.whole, module)
        return function(module, *inputs, **settings)

    if compute.remat == "none":
        return call if compute.whole is None else jax.checkpoint(call, policy=_all_but_weights)
    return jax.checkpoint(call, policy=REMAT[compute.remat])


class UserTokens(NamedTuple):
    """Keys and values of the T user tokens for one cross-attention, which adds s·attn(query, key, value) to its output.

    Attributes:
      key: None for a single token, over which attention is the constant `value`.
      value: already times the scale s.
      query: projection (out, in) of the text attention's output to queries; None for the image queries themselves
        (kind `published`).
    """

    key: Float[Array, "b t i"] | None
    value: Float[Array, "b t d"]
    query: Float[Array, "i d"] | None = None


class CrossContext(NamedTuple):
    """Text keys and values of one cross-attention, and the user tokens where they are attended to after the text."""

    key: Float[Array, "b s d"]
    value: Float[Array, "b s d"]
    user: UserTokens | None = None


Attend = Callable[[Float[Array, "b n d"], Float[Array, "b m d"], Float[Array, "b m v"], int], Float[Array, "b n v"]]


@jax.named_scope("attention")
def attend(
    query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m v"], heads: int
) -> Float[Array, "b n v"]:
    """Multi-head attention softmax(QKᵀ/√d_head)·V. The softmax is in float32.

    Args:
      query: heads side by side on the last axis; likewise key and value, which may be wider.
      heads: their number.

    Returns:
      Outputs of the heads side by side, in the type of `value`.
    """

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)  # [batch, seq, heads, head_dim]

    head_dim = query.shape[-1] // heads
    logits = jnp.einsum("BNHD,BMHD->BHNM", split(query), split(key), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * head_dim**-0.5, axis=-1).astype(value.dtype)
    out = jnp.einsum("BHNM,BMHD->BNHD", weights, split(value))
    return out.reshape(*out.shape[:2], -1)


class ComputeOptions(NamedTuple):
    """Options of a UNet that change speed and memory, and results only by rounding.

    Attributes:
      remat: rematerialization policy of each block, a key of `REMAT`.
      attend: implementation of self-attention; see `psa_jax.models.fused_attention`.
      whole: gathers a weight that is divided over devices; None where all weights are whole.
    """

    remat: str = "none"
    attend: Attend = attend
    whole: Callable[[Array], Array] | None = None


class Attention(nnx.Module):
    """Multi-head attention over an image's pixels.

    Args:
      dim: width of the pixels' states.
      heads: number of heads.
      context_dim: width of the text states; None makes it a self-attention.
      bias: of query, key and value projections. The output projection always has one.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, *, bias: bool = False, rngs: nnx.Rngs):
        self.heads = heads
        source = dim if context_dim is None else context_dim
        self.to_q = nnx.Linear(dim, dim, use_bias=bias, rngs=rngs)
        self.to_k = nnx.Linear(source, dim, use_bias=bias, rngs=rngs)
        self.to_v = nnx.Linear(source, dim, use_bias=bias, rngs=rngs)
        self.to_out_0 = nnx.Linear(dim, dim, rngs=rngs)

    def context(self, states: Float[Array, "b s c"]) -> CrossContext:
        """Keys and values of text states, or of pixels for a self-attention."""
        return CrossContext(self.to_k(states), self.to_v(states))

    def __call__(
        self, x: Float[Array, "b n d"], context: CrossContext | None = None, attend: Attend = attend
    ) -> Float[Array, "b n d"]:
        """Attention output of each pixel.

        Args:
          x: states of n pixels.
          context: keys and values; None attends to the pixels themselves.
          attend: implementation of the attention to `context`.
        """
        context = self.context(x) if context is None else context
        query = self.to_q(x)
        out = attend(query, context.key, context.value, self.heads)
        if context.user is not None:
            with jax.named_scope("user_attention"):
                out = out + user_attention(query, out, context.user, self.heads)
        return self.to_out_0(out)


def user_attention(
    query: Float[Array, "b n d"], text_output: Float[Array, "b n d"], user: UserTokens, heads: int
) -> Float[Array, "b #n d"]:  # noqa: F821
    """Attention to the user tokens, in the adapter kinds `published` and `concept`.

    Args:
      query: image queries Q, used by `published`.
      text_output: output of the text attention, from which `concept` makes its queries.
      user: keys, values and the projection to queries.
      heads: of the cross-attention.

    Returns:
      s·attn(query, key, value), one row for all n pixels where there is a single token.
    """
    if user.key is None:
        return user.value
    query_input = query if user.query is None else text_output @ user.query.T
    return attend(query_input, user.key, user.value, heads)


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Exact GELU x·Φ(x) by erf, as in torch. jax.nn.gelu uses erfc, which takes twice as long on a CPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class GEGLU(nnx.Module):
    """Gated linear unit: one half of a projection to 2·inner, times the exact GELU of the other half."""

    def __init__(self, dim: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(dim, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n i"]:
        """Gated states of n pixels."""
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * gelu(gate)


class FeedForward(nnx.Module):
    """Feed-forward layer of a transformer block: GEGLU to four times the width, and a projection back."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net_0 = GEGLU(dim, 4 * dim, rngs=rngs)
        self.net_2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """New states of n pixels, without the residual."""
        return self.net_2(self.net_0(x))


class BasicTransformerBlock(nnx.Module):
    """Transformer block: self-attention, cross-attention and feed-forward, each with a LayerNorm and a residual."""

    def __init__(self, dim: int, heads: int, context_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs)
        self.attn2 = Attention(dim, heads, context_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], context: CrossContext, attend: Attend = attend, *, started: bool = False
    ) -> Float[Array, "b n d"]:
        """New states of n pixels.

        Args:
          context: text keys and values of the cross-attention.
          attend: implementation of the self-attention.
          started: `x` comes from `start`.
        """
        x = x if started else self.start(x, attend)
        with jax.named_scope("cross_attention"):
            x = x + self.attn2(self.norm2(x), context)
        with jax.named_scope("feed_forward"):
            return x + self.ff(self.norm3(x))

    @jax.named_scope("self_attention")
    def start(self, x: Float[Array, "b n d"], attend: Attend = attend) -> Float[Array, "b n d"]:
        """The part of a call in front of the cross-attention, which depends on no context."""
        return x + self.attn1(self.norm1(x), attend=attend)


class Transformer2D(nnx.Module):
    """Transformer stack over an image: GroupNorm, projection in, `depth` blocks, projection out, residual.

    Every parameter of `transformer_blocks` has a leading axis of length `depth`.

    Args:
      dim: channels.
      heads: of every attention.
      context_dim: width of the text states.
      depth: number of blocks.
      groups: of the GroupNorm.
      linear: the projections are linear layers (SD2.x, SDXL) in place of 1×1 convolutions (SD1.x).
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int, depth: int, *, groups: int, linear: bool, rngs: nnx.Rngs
    ):
        def projection():
            return nnx.Linear(dim, dim, rngs=rngs) if linear else PixelwiseConv(dim, dim, rngs)

        def block(key):  # the caller's class of Rngs: it may have its own way to make keys
            return BasicTransformerBlock(dim, heads, context_dim, rngs=type(rngs)(key))

        self.depth = depth
        self.norm = group_norm(dim, groups, rngs, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = jax.vmap(block)(jax.random.split(rngs.params(), depth))
        self.proj_out = projection()

    def context(self, text: Float[Array, "b s c"], compute: ComputeOptions) -> tuple[CrossContext, ...]:
        """Text keys and values of each block, from text states [b, s, c].

        Args:
          compute: how weights are gathered.
        """

        def project(attention: Attention, text: Array) -> CrossContext:
            return jax.vmap(lambda one: one.context(text))(attention)

        # They are few, and stored under every policy.
        stacked = remat(project, compute._replace(remat="none"))(self.transformer_blocks.attn2, text)
        return tuple(
            jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, i, keepdims=False), stacked)  # noqa: B023
            for i in range(self.depth)
        )

    def __call__(
        self,
        x: Float[Array, "b h w d"],
        contexts: tuple[CrossContext, ...],
        compute: ComputeOptions,
        started: Float[Array, "b n d"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """New image states of the same shape.

        Args:
          contexts: one a block.
          compute: rematerialization policy and self-attention of the blocks, and how their weights are gathered.
          started: of `start`, where it has been called.
        """

        def run(block: BasicTransformerBlock, hidden: Array, context: CrossContext, **settings: Any) -> Array:
            call = remat(BasicTransformerBlock.__call__, compute, attend=compute.attend, **settings)
            return call(block, hidden, context)

        if started is None:
            hidden, done = self._pixels(x), 0
        else:
            hidden, done = run(self._block(0), started, contexts[0], started=True), 1
        if self.depth - done == 1:  # a loop of one step would hide the block from the compiler
            hidden = run(self._block(-1), hidden, contexts[-1])
        elif self.depth > done:
            blocks = jax.tree.map(lambda leaf: leaf[done:], self.transformer_blocks)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts[done:])
            hidden, _ = jax.lax.scan(
                lambda hidden, step: (run(step[0], hidden, step[1]), None), hidden, (blocks, stacked)
            )
        return x + self.proj_out(hidden.reshape(x.shape))

    def start(self, x: Float[Array, "b h w d"], compute: ComputeOptions) -> Float[Array, "b n d"]:
        """The state in front of the first cross-attention, which depends on no context.

        Args:
          x, compute: as in a call.
        """
        start = remat(BasicTransformerBlock.start, compute, attend=compute.attend)
        return start(self._block(0), self._pixels(x))

    def _pixels(self, x: Float[Array, "b h w d"]) -> Float[Array, "b n d"]:
        return self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[3])

    def _block(self, number: int) -> BasicTransformerBlock:
        return jax.tree.map(lambda leaf: leaf[number], self.transformer_blocks)
