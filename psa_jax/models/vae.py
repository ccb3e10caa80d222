"""The Stable Diffusion autoencoder (diffusers' AutoencoderKL) in Flax NNX, NHWC."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from psa_jax.models.attention import Attention
from psa_jax.models.config import VAEConfig
from psa_jax.models.norms import group_norm
from psa_jax.models.resnet import Downsample, ResnetBlock, Upsample, conv3x3

EPS = 1e-6
"""ε of every group norm of the VAE."""


class PixelAttention(Attention):
    """Single-head self-attention over all pixels of an image, with a residual."""

    def __init__(self, dim: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(dim, heads=1, bias=True, rngs=rngs)
        self.group_norm = group_norm(dim, groups, rngs, EPS)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """New image states of the same shape."""
        pixels = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(pixels).reshape(x.shape)


class Stage(nnx.Module):
    """Resnets of one resolution and a resampling to the next one.

    Args:
      cin, cout: channels before and after.
      layers: number of resnets.
      groups: of the group norms.
      resample: "down", "up" or None.
    """

    def __init__(self, cin: int, cout: int, layers: int, groups: int, *, resample: str | None, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResnetBlock(cin if i == 0 else cout, cout, None, groups=groups, eps=EPS, rngs=rngs) for i in range(layers)]
        )
        self.downsamplers = nnx.List([Downsample(cout, asymmetric=True, rngs=rngs)] if resample == "down" else [])
        self.upsamplers = nnx.List([Upsample(cout, rngs=rngs)] if resample == "up" else [])

    def __call__(self, x: Float[Array, "b h w cin"]) -> Float[Array, "b h2 w2 cout"]:
        """Image states at the next resolution."""
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Middle(nnx.Module):
    """The layers of the lowest resolution: resnet, attention over all pixels, resnet."""

    def __init__(self, dim: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(dim, dim, None, groups=groups, eps=EPS, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(dim, groups, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """New image states of the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Convolutional encoder of images to the moments of latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3x3(config.in_channels, widths[0], rngs)
        self.down_blocks = nnx.List(
            [
                Stage(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    resample="down" if i < last else None,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, rngs, EPS)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hl wl m"]:
        """Moments [b, h/f, w/f, 2·latent_channels] of images, f = `config.downscale`."""
        x = self.conv_in(x)
        for level, block in enumerate(self.down_blocks):
            with jax.named_scope(f"down_blocks_{level}"):
                x = block(x)
        with jax.named_scope("mid_block"):
            x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nnx.Module):
    """Convolutional decoder of latents to images, after `post_quant_conv`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3x3(config.latent_channels, widths[0], rngs)
        self.mid_block = Middle(widths[0], groups, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Stage(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    resample="up" if i < last else None,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = group_norm(widths[-1], groups, rngs, EPS)
        self.conv_out = conv3x3(widths[-1], config.out_channels, rngs)

    def __call__(self, z: Float[Array, "b hl wl c"]) -> Float[Array, "b h w o"]:
        """Images [b, f·h, f·w, channels] of latents, f = `config.downscale`."""
        x = self.conv_in(z)
        with jax.named_scope("mid_block"):
            x = self.mid_block(x)
        for level, block in enumerate(self.up_blocks):
            with jax.named_scope(f"up_blocks_{level}"):
                x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class VAE(nnx.Module):
    """Autoencoder between pixels in [−1, 1] and latents. Latents here are not scaled by `config.scaling_factor`.

    Source: arXiv 2112.10752, section 3.1.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = nnx.Conv(2 * latent, 2 * latent, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(latent, latent, (1, 1), rngs=rngs)

    @jax.named_scope("vae_encode")
    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b hl wl m"]:
        """Moments of the latents' normal distribution.

        Args:
          images: pixels in [−1, 1].

        Returns:
          Mean and log-variance (clamped to [−30, 20]), side by side on the last axis.
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, -30.0, 20.0)], axis=-1)

    @jax.named_scope("vae_decode")
    def decode(self, latents: Float[Array, "b hl wl c"]) -> Float[Array, "b h w o"]:
        """Pixels, not clipped to [−1, 1], of unscaled latents."""
        return self.decoder(self.post_quant_conv(latents))


def sample_latents(
    moments: Float[Array, "b h w m"], noise: Float[Array, "b h w c"], scaling_factor: float
) -> Float[Array, "b h w c"]:
    """Scaled latents (mean + exp(log-variance/2)·noise)·scaling_factor, on which the UNet is trained.

    Args:
      moments: of `VAE.encode`.
      noise: standard normal.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return (mean + jnp.exp(0.5 * log_variance) * noise) * scaling_factor


def latent_noise(key: PRNGKeyArray, moments: Float[Array, "b h w m"]) -> Float[Array, "b h w c"]:
    """Standard normal noise for `sample_latents`, in the type of the moments."""
    return jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2), moments.dtype)
