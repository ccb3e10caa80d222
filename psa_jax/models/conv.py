"""Convolutions. On a CPU, those with more weights than pixels are computed as one matrix product."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

CONVOLUTION = "convolution"
"""Name of a convolution's output (`checkpoint_name`), for rematerialization policies."""


class PixelwiseConv(nnx.Conv):
    """1×1 convolution with bias, as a matrix product: of few pictures, a TPU's compiler lays out convolutions badly."""

    def __init__(self, cin: int, cout: int, rngs: nnx.Rngs):
        super().__init__(cin, cout, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """[b, h, w, i] → [b, h, w, o], NHWC."""
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        return x @ kernel[0, 0] + bias[None, None, None, :]


class Conv(nnx.Conv):
    """Convolution with bias. On a CPU it becomes a matrix product over patches where the kernel outweighs the image.

    XLA's CPU convolutions are several times slower than a matrix product where the kernel holds more numbers than the
    image's patches (low resolutions, small batches), and their gradients first transpose a copy of the kernel. Copying
    the patches is then cheaper.
    """

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """[b, h, w, i] → [b, h2, w2, o], NHWC."""
        if len(x) * math.prod(self._sizes(x)) > self.kernel.shape[-1]:
            return super().__call__(x)
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        # Selected at compile time, by the platform that the program is compiled for.
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
        """Height and width of the output."""
        each = zip(x.shape[1:3], self.padding, self.kernel_size, self._strides(), strict=True)
        return tuple((size + sum(pad) - kernel) // stride + 1 for size, pad, kernel, stride in each)
