"""Convolutional blocks shared by the UNet and the VAE of diffusers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.models.conv import Conv, PixelwiseConv
from psa_jax.models.norms import group_norm


def conv3x3(cin: int, cout: int, rngs: nnx.Rngs, stride: int = 1) -> Conv:
    """A 3×3 convolution padded by one pixel on every side, also when strided (torch's padding=1)."""
    return Conv(cin, cout, (3, 3), strides=stride, padding=((1, 1), (1, 1)), rngs=rngs)


class ResnetBlock(nnx.Module):
    """Residual block x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), with a 1×1 shortcut to another width.

    Args:
      cin, cout: channels before and after.
      time_dim: width of the timestep embedding; None for a block without one (the VAE's).
      groups, eps: of the group norms.
    """

    def __init__(self, cin: int, cout: int, time_dim: int | None, *, groups: int, eps: float, rngs: nnx.Rngs):
        self.norm1 = group_norm(cin, groups, rngs, eps)
        self.conv1 = conv3x3(cin, cout, rngs)
        self.time_emb_proj = None if time_dim is None else nnx.Linear(time_dim, cout, rngs=rngs)
        self.norm2 = group_norm(cout, groups, rngs, eps)
        self.conv2 = conv3x3(cout, cout, rngs)
        self.conv_shortcut = None if cin == cout else PixelwiseConv(cin, cout, rngs)

    def __call__(
        self, x: Float[Array, "b h w cin"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w cout"]:
        """New image states.

        Args:
          time: timestep embedding, for blocks with a `time_dim`.
        """
        hidden = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        hidden = self.conv2(self.norm2(hidden, silu=True))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Downsample(nnx.Module):
    """Convolution with stride 2, which halves height and width.

    Args:
      asymmetric: pads right and below only, as the VAE does; the UNet pads every side.
    """

    def __init__(self, dim: int, *, asymmetric: bool = False, rngs: nnx.Rngs):
        pad = ((0, 1), (0, 1)) if asymmetric else ((1, 1), (1, 1))
        self.conv = Conv(dim, dim, (3, 3), strides=2, padding=pad, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d"]:
        """Image states at half the size; an odd size is rounded up (down if `asymmetric`)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling to twice the size, followed by a convolution."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(dim, dim, rngs)

    def __call__(self, x: Float[Array, "b h w d"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 d"]:
        """Image states at twice the size, or at `size` (height, width), which may be one pixel less on a side."""
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if (
            size is not None
        ):  # an odd size was rounded up on the way down; torch's nearest neighbour to 2n − 1 is a crop
            doubled = doubled[:, : size[0], : size[1]]
        return self.conv(doubled)
