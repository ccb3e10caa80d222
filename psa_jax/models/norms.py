"""Group norm and layer norm in float32, with gradients that read the states twice.

Derivatives of the textbook formula are taken by hand: that of the variance by the mean is zero, which automatic
differentiation sums anew, and the sums over a group that the states' gradient needs are those of scale and bias.
The backward pass keeps the states in their own type, and nothing in float32 of their size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.LayerNorm):
    """Layer norm computed in float32."""

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
        """Normalized states in the type of `x`."""
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class GroupNorm(nnx.GroupNorm):
    """Group norm computed in float32, with the SiLU that may follow it."""

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "b *s d"], *, silu: bool = False) -> Float[Array, "b *s d"]:
        """Normalized states in the type of `x`; channels are the last axis.

        Args:
          silu: apply z·sigmoid(z) before the result is rounded to the type of `x`.
        """
        return _group_norm(x, self.scale[...], self.bias[...], self.num_groups, self.epsilon, silu)


def layer_norm(dim: int, rngs: nnx.Rngs, eps: float = 1e-5) -> LayerNorm:
    """A `LayerNorm` of this width with the two-pass variance: E[x²] − E[x]² loses too many digits."""
    return LayerNorm(dim, epsilon=eps, rngs=rngs)


def group_norm(dim: int, groups: int, rngs: nnx.Rngs, eps: float) -> GroupNorm:
    """A `GroupNorm` over this many channels and groups, with the shifted variance of `moments`."""
    return GroupNorm(dim, num_groups=groups, epsilon=eps, rngs=rngs)


def moments(x: Float[Array, "b *s d"], groups: int) -> tuple[Float[Array, "b g"], Float[Array, "b g"]]:
    """Mean and variance of each group of channels, in one pass over the states.

    Each channel is shifted by the mean c of its first row of w of the n pixels: Var = E[(x − c)²] − (E[x] − c)². From
    (c − E[x])² ≤ Var·n/w follows that the difference loses at most a factor of n/w (an image's height) in precision,
    however far the mean is from zero. Unshifted it loses E[x]²/Var. Channels are then joined to groups by
    Var = E[Var_c] + E[(E_c − E)²], where nothing cancels.

    Source: Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983).
    """
    pixels = tuple(range(1, x.ndim - 1))
    shift = jnp.mean(x[:, :1].astype(jnp.float32), axis=pixels, keepdims=True)
    moved = x.astype(jnp.float32) - shift
    mean, square = jnp.mean(moved, axis=pixels), jnp.mean(moved**2, axis=pixels)
    variance = jnp.maximum(square - mean**2, 0.0)

    mean, shift, variance = (each.reshape(len(x), groups, -1) for each in (mean, shift, variance))
    base = jnp.mean(shift, axis=-1, keepdims=True)
    mean = mean + (shift - base)  # means of channels may be far from zero, their differences from each other are not
    between = jnp.mean(mean, axis=-1, keepdims=True)
    variance = jnp.mean(variance + (mean - between) ** 2, axis=-1)
    return (base + between).squeeze(-1), variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> Array:
    return _group_norm_forward(x, scale, bias, groups, eps, silu)[0]


def _group_norm_forward(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
) -> tuple[Array, tuple[Array, ...]]:
    mean, variance = moments(x, groups)
    inverse = jax.lax.rsqrt(variance + eps)
    out = _normal(x, mean, inverse) * _along(scale, x) + _along(bias, x)
    if silu:
        out = jax.nn.silu(out)
    return out.astype(x.dtype), (x, scale, bias, mean, inverse)


@jax.named_scope("norm")
def _group_norm_backward(
    groups: int, eps: float, silu: bool, kept: tuple[Array, ...], out: Array
) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = kept
    normal, weight, out = _normal(x, mean, inverse), _along(scale, x), out.astype(jnp.float32)
    if silu:
        z = normal * weight + _along(bias, x)
        open_ = jax.nn.sigmoid(z)
        out = out * open_ * (1.0 + z * (1.0 - open_))
    pixels = tuple(range(1, x.ndim - 1))
    of_bias, of_scale = jnp.sum(out, axis=pixels), jnp.sum(out * normal, axis=pixels)  # [batch, channels]
    size = math.prod(x.shape[1:]) // groups

    def over_group(sums: Array) -> Array:
        grouped = jnp.sum((sums * weight.reshape(1, -1)).reshape(len(x), groups, -1), axis=-1) / size
        return _over_pixels(grouped, x)

    of_x = _over_pixels(inverse, x) * (out * weight - over_group(of_bias) - normal * over_group(of_scale))
    return of_x.astype(x.dtype), jnp.sum(of_scale, 0).astype(scale.dtype), jnp.sum(of_bias, 0).astype(bias.dtype)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _normal(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(jnp.float32) - _over_pixels(mean, x)) * _over_pixels(inverse, x)


def _over_pixels(of_group: Array, x: Array) -> Array:
    """[batch, groups] → [batch, 1, …, channels]."""
    channels = jnp.repeat(of_group, x.shape[-1] // of_group.shape[-1], axis=-1)
    return channels.reshape(len(x), *(1,) * (x.ndim - 2), -1)


def _along(weights: Array, x: Array) -> Array:
    """Weights of the last axis in float32, with the rank of x."""
    return weights.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    states = x.astype(jnp.float32)
    mean = jnp.mean(states, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean((states - mean) ** 2, axis=-1, keepdims=True) + eps)
    out = (states - mean) * inverse * _along(scale, x) + _along(bias, x)
    return out.astype(x.dtype), (x, scale, bias, mean, inverse)


@jax.named_scope("norm")
def _layer_norm_backward(eps: float, kept: tuple[Array, ...], out: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = kept
    normal, out = (x.astype(jnp.float32) - mean) * inverse, out.astype(jnp.float32)
    weighted = out * _along(scale, x)
    shared = jnp.mean(weighted, axis=-1, keepdims=True)
    along = jnp.mean(weighted * normal, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = jnp.sum(out * normal, axis=rows), jnp.sum(out, axis=rows)
    of_x = inverse * (weighted - shared - normal * along)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
