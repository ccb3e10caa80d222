"""Convolutions; on a CPU, where the picture is smaller than the kernel, as one matrix product."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

CONVOLUTION = "convolution"
"""Name of a result, for policies of what is stored for the backward pass."""


class Conv(nnx.Conv):
    """A convolution with bias, [b, h, w, i] → [b, h2, w2, o].

    XLA's convolutions on a CPU take several times as long as they need where a kernel holds more numbers than the
    patches of the picture (the lower levels of a UNet, in small batches), and their gradients turn a copy of the
    kernel around first. There it is cheaper to copy the patches.
    """

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        if len(x) * math.prod(self._sizes(x)) > self.kernel.shape[-1]:
            return super().__call__(x)
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        # The choice is made when the program is compiled, by what it is compiled for.
        out = jax.lax.platform_dependent(x, kernel, cpu=self._as_product, default=self._as_convolution)
        return checkpoint_name(out, CONVOLUTION) + bias[None, None, None, :]

    def _as_convolution(self, x: Array, kernel: Array) -> Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, self._strides(), self.padding, dimension_numbers=names)

    def _as_product(self, x: Array, kernel: Array) -> Array:
        (high, wide), (down, right) = self._sizes(x), self._strides()
        padded = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        patches = [
            padded[:, i : i + down * (high - 1) + 1 : down, j : j + right * (wide - 1) + 1 : right]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    def _strides(self) -> tuple[int, int]:
        return (self.strides,) * 2 if isinstance(self.strides, int) else tuple(self.strides)

    def _sizes(self, x: Array) -> tuple[int, ...]:
        """Height and width of the result."""
        each = zip(x.shape[1:3], self.padding, self.kernel_size, self._strides(), strict=True)
        return tuple((size + sum(pad) - kernel) // stride + 1 for size, pad, kernel, stride in each)
