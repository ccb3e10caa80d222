"""FID's Inception-v3 in Flax NNX: the network of TensorFlow's release of 2015-12-05, which papers report FID with.

It is not the one of torchvision and timm: its average pools count no padding, and its last block takes a maximum.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

FEATURES = 2048
SIDE = 299
"""Height and width of the pictures that it was trained on."""

_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution without bias, a batch normalisation and a ReLU.

    Attributes:
      name: in the published weights.
      width: channels that it gives.
      window: height and width of its kernel.
      stride: 1, or 2.
      pad: whether the edges are padded, so that height and width stay.
    """

    name: str
    width: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: bool = True


Pool = Literal["mean", "maximum", "halve"]
"""Over 3 × 3 places: their mean, their maximum, or their maximum at every second place."""
Branch = tuple[Layer | tuple[Layer, Layer], ...]
"""Layers one after the other; two in a tuple read the same and stand side by side."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Branches side by side, of which the last pools.

    Attributes:
      branches: all others.
      pool: how.
      pooled: the layer after the pool; None for none.
    """

    branches: tuple[Branch, ...]
    pool: Pool
    pooled: Layer | None = None


def _first(width: int) -> Block:
    """Up to 5 × 5, at 35 × 35 places."""
    return Block(
        (
            (Layer("branch1x1", 64),),
            (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        "mean",
        Layer("branch_pool", width),
    )


def _middle(width: int) -> Block:
    """7 × 7 as rows and columns, at 17 × 17 places."""
    row, column = (1, 7), (7, 1)
    return Block(
        (
            (Layer("branch1x1", 192),),
            (
                Layer("branch7x7_1", width),
                Layer("branch7x7_2", width, row),
                Layer("branch7x7_3", 192, column),
            ),
            (
                Layer("branch7x7dbl_1", width),
                Layer("branch7x7dbl_2", width, column),
                Layer("branch7x7dbl_3", width, row),
                Layer("branch7x7dbl_4", width, column),
                Layer("branch7x7dbl_5", 192, row),
            ),
        ),
        "mean",
        Layer("branch_pool", 192),
    )


def _last(pool: Pool) -> Block:
    """3 × 3 as a row beside a column, at 8 × 8 places."""
    row, column = (1, 3), (3, 1)
    return Block(
        (
            (Layer("branch1x1", 320),),
            (
                Layer("branch3x3_1", 384),
                (Layer("branch3x3_2a", 384, row), Layer("branch3x3_2b", 384, column)),
            ),
            (
                Layer("branch3x3dbl_1", 448),
                Layer("branch3x3dbl_2", 384, (3, 3)),
                (Layer("branch3x3dbl_3a", 384, row), Layer("branch3x3dbl_3b", 384, column)),
            ),
        ),
        pool,
        Layer("branch_pool", 192),
    )


_TO_17 = Block(
    (
        (Layer("branch3x3", 384, (3, 3), 2, pad=False),),
        (
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3), 2, pad=False),
        ),
    ),
    "halve",
)
_TO_8 = Block(
    (
        (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2, pad=False)),
        (
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, (3, 3), 2, pad=False),
        ),
    ),
    "halve",
)

STEM: tuple[Layer | Pool, ...] = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), 2, pad=False),
    Layer("Conv2d_2a_3x3", 32, (3, 3), pad=False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), pad=False),
    "halve",
)
"""What comes before the blocks."""

BLOCKS: dict[str, Block] = {
    "Mixed_5b": _first(32),
    "Mixed_5c": _first(64),
    "Mixed_5d": _first(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _last("mean"),
    "Mixed_7c": _last("maximum"),
}
"""Name in the published weights → block, in order."""


def _side_by_side(step: Layer | tuple[Layer, Layer]) -> tuple[Layer, ...]:
    return (step,) if isinstance(step, Layer) else step


def _pool(x: Float[Array, "b h w d"], how: Pool) -> Float[Array, "b h2 w2 d"]:
    window = (3, 3)
    if how == "mean":
        return nnx.avg_pool(x, window, (1, 1), "SAME", count_include_pad=False)
    if how == "maximum":
        return nnx.max_pool(x, window, (1, 1), "SAME")
    return nnx.max_pool(x, window, (2, 2), "VALID")


class ConvNorm(nnx.Module):
    """A `Layer`."""

    def __init__(self, cin: int, layer: Layer, *, rngs: nnx.Rngs):
        # Accelerators would otherwise multiply in fewer bits, and FID would depend on the machine.
        self.conv = nnx.Conv(
            cin,
            layer.width,
            layer.window,
            strides=layer.stride,
            padding="SAME" if layer.pad else "VALID",
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(layer.width, use_running_average=True, epsilon=_EPSILON, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """[b, h, w, i] → [b, h2, w2, o]."""
        return jax.nn.relu(self.bn(self.conv(x)))


class InceptionBlock(nnx.Module):
    """A `Block`."""

    def __init__(self, cin: int, block: Block, *, rngs: nnx.Rngs):
        self.block, self.width = block, 0
        for branch in block.branches:
            before = cin
            for step in branch:
                layers = _side_by_side(step)
                for layer in layers:
                    setattr(self, layer.name, ConvNorm(before, layer, rngs=rngs))
                before = sum(layer.width for layer in layers)
            self.width += before
        if block.pooled is None:
            self.width += cin
        else:
            self.branch_pool = ConvNorm(cin, block.pooled, rngs=rngs)
            self.width += block.pooled.width

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """All branches side by side, in the table's order; the pool comes last."""
        found = []
        for branch in self.block.branches:
            states = x
            for step in branch:
                layers = _side_by_side(step)
                states = jnp.concatenate([getattr(self, layer.name)(states) for layer in layers], axis=-1)
            found.append(states)
        pooled = _pool(x, self.block.pool)
        found.append(pooled if self.block.pooled is None else self.branch_pool(pooled))
        return jnp.concatenate(found, axis=-1)


class Inception(nnx.Module):
    """FID's Inception-v3, up to the mean over all places; the classifier behind it is left out.

    Source: C. Szegedy et al., Rethinking the Inception Architecture for Computer Vision (2015), with batch
    normalisation, and as TensorFlow's graph of 2015-12-05 pools. That graph's weights are published for torch as
    `pt_inception-2015-12-05-6726825d.pth`, whose names these are.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        width = 3
        for step in STEM:
            if isinstance(step, Layer):
                setattr(self, step.name, ConvNorm(width, step, rngs=rngs))
                width = step.width
        for name, block in BLOCKS.items():
            made = InceptionBlock(width, block, rngs=rngs)
            setattr(self, name, made)
            width = made.width

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Features of each picture.

        Args:
          pixels: RGB, (value − 128) / 128 of values from 0 to 255. FID's are 299 high and wide; at least 75 are needed.
        """
        states = pixels
        for step in STEM:
            states = getattr(self, step.name)(states) if isinstance(step, Layer) else _pool(states, step)
        for name in BLOCKS:
            with jax.named_scope(name):
                states = getattr(self, name)(states)
        return states.mean(axis=(1, 2))
