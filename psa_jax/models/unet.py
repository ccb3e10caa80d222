"""The Stable Diffusion UNet (diffusers' UNet2DConditionModel) in Flax NNX, NHWC.

Attribute names follow diffusers' parameter names: weights are mapped by rule (`psa_jax.interop.weights`). Layers run
under `jax.named_scope` with the same names, such as `unet/down_blocks_0/resnets_1`, for profiles and cost by part.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.errors import PSAError
from psa_jax.models.attention import ComputeOptions, CrossContext, Transformer2D, remat
from psa_jax.models.config import UNetConfig
from psa_jax.models.norms import group_norm
from psa_jax.models.resnet import Downsample, ResnetBlock, Upsample, conv3x3


class AddedConditions(NamedTuple):
    """Conditions of SDXL besides the text states; they join the timestep embedding.

    Attributes:
      pooled: projected pooled text of the second encoder.
      time_ids: original height and width, crop top and left, target height and width, in pixels.
    """

    pooled: Float[Array, "b p"]
    time_ids: Float[Array, "b i"]


def timestep_embedding(timesteps: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Sinusoidal embedding [cos, sin] of t·10000^(−i/(dim/2)), in float32 (flip_sin_to_cos, freq_shift 0).

    Source: arXiv 1706.03762, section 3.5.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepMLP(nnx.Module):
    """Two linear layers with a SiLU between them, after a sinusoidal embedding of `dim` numbers."""

    def __init__(self, dim: int, out: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(dim, out, rngs=rngs)
        self.linear_2 = nnx.Linear(out, out, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b o"]:
        """Embedding [batch, out] that the resnets project to their channels."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Block(nnx.Module):
    """The layers of one resolution on one way: resnets, transformer stacks, and a resampling to the next resolution.

    Args:
      widths_in: input channels of each resnet; there are as many resnets.
      width: output channels of all layers.
      level: index of the resolution in the configuration.
      attention: a transformer stack follows each resnet.
      resample: "down", "up" or None.
    """

    def __init__(
        self,
        widths_in: list[int],
        width: int,
        level: int,
        config: UNetConfig,
        *,
        attention: bool,
        resample: str | None,
        rngs: nnx.Rngs,
    ):
        time_dim = 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            [
                ResnetBlock(cin, width, time_dim, groups=config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
                for cin in widths_in
            ]
        )
        self.attentions = nnx.List(
            [_transformer(level, config, rngs) for _ in widths_in] if attention else [],
        )
        self.downsamplers = nnx.List([Downsample(width, rngs=rngs)] if resample == "down" else [])
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs)] if resample == "up" else [])


class MidBlock(nnx.Module):
    """The layers of the lowest resolution between both ways: resnet, transformer stack, resnet."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        width, time_dim = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            [
                ResnetBlock(width, width, time_dim, groups=config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
                for _ in range(2)
            ]
        )
        self.attentions = nnx.List([_transformer(-1, config, rngs)])


def _transformer(level: int, config: UNetConfig, rngs: nnx.Rngs) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        config.depths[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        rngs=rngs,
    )


class UNet(nnx.Module):
    """Denoiser: predicts noise, v or clean latents from noisy latents, timesteps and cross-attention contexts.

    A call is `run_prefix`, what is in front of the first cross-attention, and then `run_suffix`.

    Attributes:
      config: sizes.
      compute: rematerialization policy, implementation of self-attention, and how divided weights are gathered. Set it
        before a call.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute = ComputeOptions()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = conv3x3(config.in_channels, widths[0], rngs)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0], rngs=rngs)
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = None if added is None else TimestepMLP(added, 4 * widths[0], rngs=rngs)

        down, skips, width_in = [], [widths[0]], widths[0]
        for level, (block_type, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            ins = [width_in] + [width] * (config.layers_per_block - 1)
            resample = "down" if level < last else None
            down.append(Block(ins, width, level, config, attention=block_type[0] == "C", resample=resample, rngs=rngs))
            skips += [width] * (config.layers_per_block + (resample is not None))
            width_in = width
        self.down_blocks = nnx.List(down)
        self.mid_block = MidBlock(config, rngs=rngs)

        up = []
        for level, block_type in zip(range(last, -1, -1), config.up_block_types, strict=True):
            width, ins = widths[level], []
            for _ in range(config.layers_per_block + 1):
                ins.append(width_in + skips.pop())
                width_in = width
            resample = "up" if level > 0 else None
            up.append(Block(ins, width, level, config, attention=block_type[0] == "C", resample=resample, rngs=rngs))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = group_norm(widths[0], config.norm_num_groups, rngs, config.norm_eps)
        self.conv_out = conv3x3(widths[0], config.out_channels, rngs)

    @jax.named_scope("unet/contexts")
    def context(self, text: Float[Array, "b s c"]) -> tuple[CrossContext, ...]:
        """Text keys and values of every cross-attention, in adapter order (`config.cross_attentions`)."""
        blocks = [*self.down_blocks, *self.up_blocks, self.mid_block]
        stacks = (stack for block in blocks for stack in block.attentions)
        return tuple(layer for stack in stacks for layer in stack.context(text, self.compute))

    def _in_call_order(self, contexts: tuple[CrossContext, ...]) -> Iterator[tuple[CrossContext, ...]]:
        """Contexts of each transformer stack in the order of the calls: down, mid, up. Adapter order has mid last."""
        down = sum(stack.depth for block in self.down_blocks for stack in block.attentions)
        mid = self.config.depths[-1]
        rest = contexts[:down] + contexts[-mid:] + contexts[down:-mid]
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            for stack in block.attentions:
                yield rest[: stack.depth]
                rest = rest[stack.depth :]

    def _time(
        self, timesteps: Float[Array, " b"], added: AddedConditions | None, dtype: jnp.dtype
    ) -> Float[Array, "b t"]:
        """Timestep embedding, with SDXL's added conditions in it."""
        time = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]).astype(dtype))
        if (added is None) != (self.add_embedding is None):
            what = "needs added conditions: give" if added is None else "takes no added conditions: leave out"
            raise PSAError(f"UNet: addition_embed_type {self.config.addition_embed_type!r} {what} `added`")
        if added is None:
            return time
        ids = timestep_embedding(added.time_ids.reshape(-1), self.config.addition_time_embed_dim)
        ids = ids.reshape(len(added.time_ids), -1).astype(dtype)
        conditions = jnp.concatenate([added.pooled.astype(dtype), ids], axis=-1)
        if conditions.shape[-1] != (width := self.config.projection_class_embeddings_input_dim):
            raise PSAError(
                f"UNet: pooled text and time_ids are {conditions.shape[-1]} numbers together, "
                f"projection_class_embeddings_input_dim is {width}; the text encoder is of another model"
            )
        return time + self.add_embedding(conditions)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        contexts: tuple[CrossContext, ...],
        added: AddedConditions | None = None,
    ) -> Float[Array, "b h w o"]:
        """Prediction for noisy latents.

        Args:
          latents: x_t of any height and width; odd sizes round up on the way down.
          timesteps: training timesteps in [0, T), fractions allowed.
          contexts: of `context`, possibly changed by an adapter.
          added: SDXL's conditions; None for other models.

        Returns:
          The model's output at the size of `latents`, with `config.out_channels` channels.

        Raises:
          PSAError: `added` is missing, not allowed, or of the wrong width.
        """
        return self.run_suffix(self.run_prefix(latents, timesteps, added), contexts)

    @jax.named_scope("unet")
    def run_prefix(
        self, latents: Float[Array, "b h w c"], timesteps: Float[Array, " b"], added: AddedConditions | None = None
    ) -> "PrefixState":
        """Runs what is in front of the first cross-attention. Its state depends on prompt and user by `added` alone.

        Args:
          latents, timesteps, added: as in `__call__`.

        Returns:
          The state from which `run_suffix` continues.

        Raises:
          PSAError: as `__call__`.
        """
        with jax.named_scope("time_embedding"):
            time = self._time(timesteps, added, latents.dtype)
        with jax.named_scope("conv_in"):
            hidden = self.conv_in(latents)
        path, first = self._down_path(), self._first_attention()
        state = _down(path[:first], PrefixState(time, hidden, (hidden,)), iter(()), self.compute)
        for name, layer, _ in path[first : first + 1]:
            with jax.named_scope(name):
                state = state._replace(started=layer.start(state.hidden, self.compute))
        return state

    @jax.named_scope("unet")
    def run_suffix(self, prefix: "PrefixState", contexts: tuple[CrossContext, ...]) -> Float[Array, "b h w o"]:
        """Runs the layers from the first cross-attention on.

        Args:
          prefix: of `run_prefix`.
          contexts: as in `__call__`.

        Returns:
          The prediction, as `__call__`.
        """
        stack_contexts = self._in_call_order(contexts)
        path = self._down_path()[self._first_attention() :]
        time, hidden, skips, _ = _down(path, prefix, stack_contexts, self.compute)

        hidden = self._mid(hidden, time, next(stack_contexts))
        hidden = self._up(hidden, time, list(skips), stack_contexts)
        with jax.named_scope("conv_out"):
            return self.conv_out(self.conv_norm_out(hidden, silu=True))

    @jax.named_scope("mid_block")
    def _mid(self, hidden: Array, time: Array, contexts: tuple[CrossContext, ...]) -> Array:
        before, after = self.mid_block.resnets
        run = remat(ResnetBlock.__call__, self.compute)
        with jax.named_scope("resnets_0"):
            hidden = run(before, hidden, time)
        with jax.named_scope("attentions_0"):
            hidden = self.mid_block.attentions[0](hidden, contexts, self.compute)
        with jax.named_scope("resnets_1"):
            return run(after, hidden, time)

    def _up(
        self, hidden: Array, time: Array, skips: list[Array], contexts: Iterator[tuple[CrossContext, ...]]
    ) -> Array:
        for level, block in enumerate(self.up_blocks):
            with jax.named_scope(f"up_blocks_{level}"):
                for i, resnet in enumerate(block.resnets):
                    with jax.named_scope(f"resnets_{i}"):
                        joined = jnp.concatenate([hidden, skips.pop()], axis=-1)
                        hidden = remat(ResnetBlock.__call__, self.compute)(resnet, joined, time)
                    if block.attentions:
                        with jax.named_scope(f"attentions_{i}"):
                            hidden = block.attentions[i](hidden, next(contexts), self.compute)
                for upsample in block.upsamplers:
                    with jax.named_scope("upsamplers_0"):
                        hidden = upsample(hidden, skips[-1].shape[1:3])
        return hidden

    def _down_path(self) -> list["_DownLayer"]:
        """The layers on the way down, in the order of the calls."""
        path = []
        for level, block in enumerate(self.down_blocks):
            name = f"down_blocks_{level}"
            for i, resnet in enumerate(block.resnets):
                path.append(_DownLayer(f"{name}/resnets_{i}", resnet, not block.attentions))
                path += [_DownLayer(f"{name}/attentions_{i}", one, True) for one in block.attentions[i : i + 1]]
            path += [_DownLayer(f"{name}/downsamplers_0", downsample, True) for downsample in block.downsamplers]
        return path

    def _first_attention(self) -> int:
        path = self._down_path()
        return next((i for i, one in enumerate(path) if isinstance(one.layer, Transformer2D)), len(path))


class _DownLayer(NamedTuple):
    """A layer on the way down, its scope's name, and whether a skip connection starts after it."""

    name: str
    layer: ResnetBlock | Transformer2D | Downsample
    skip: bool


class PrefixState(NamedTuple):
    """State of a prediction on the way down.

    Attributes:
      time: timestep embedding.
      hidden: image states.
      skips: states at the skip connections so far.
      started: where the next layer is a transformer stack, its state in front of its first cross-attention.
    """

    time: Float[Array, "b t"]
    hidden: Float[Array, "b h w c"]
    skips: tuple[Float[Array, "b _h _w _c"], ...]
    started: Float[Array, "b n c"] | None = None


def _down(
    path: list[_DownLayer],
    prefix: PrefixState,
    contexts: Iterator[tuple[CrossContext, ...]],
    compute: ComputeOptions,
) -> PrefixState:
    """The state after these layers; each transformer stack takes the next contexts."""
    time, hidden, skips, started = prefix
    for name, layer, skip in path:
        with jax.named_scope(name):
            if isinstance(layer, ResnetBlock):
                hidden = remat(ResnetBlock.__call__, compute)(layer, hidden, time)
            elif isinstance(layer, Transformer2D):
                hidden, started = layer(hidden, next(contexts), compute, started), None
            else:
                hidden = layer(hidden)
        if skip:
            skips = (*skips, hidden)
    return PrefixState(time, hidden, skips)
