"""The VAE and its modules against diffusers' torch modules with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from support.torch_models import (
    TOLERANCE,
    VAE_SIZES,
    VAES,
    difference,
    nhwc,
    randomise,
    run,
    tensor,
    to_flax,
    torch_vae,
)

from psa_jax.models.config import VAEConfig
from psa_jax.models.vae import VAE, Middle, PixelAttention, Stage, latent_noise, sample_latents


def call(model, *args):
    return model(*args)


def test_pixel_attention(tmp_path):
    theirs = TorchAttention(12, heads=1, dim_head=12, norm_num_groups=4, eps=1e-6, bias=True, residual_connection=True)
    theirs = randomise(theirs, seed=1)
    ours = to_flax(lambda r: PixelAttention(12, 4, rngs=r), theirs, tmp_path)
    x = tensor(2, 12, 3, 5)
    assert difference(run(call, ours, nhwc(x)), theirs(x)) <= TOLERANCE


def test_middle(tmp_path):
    theirs = UNetMidBlock2D(12, temb_channels=None, resnet_eps=1e-6, resnet_groups=4, attention_head_dim=12)
    theirs = randomise(theirs, seed=2)
    ours = to_flax(lambda r: Middle(12, 4, rngs=r), theirs, tmp_path)
    x = tensor(2, 12, 3, 5)
    assert difference(run(call, ours, nhwc(x)), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("resample", [True, False])
def test_encoder_stage(resample, tmp_path):
    theirs = DownEncoderBlock2D(
        8, 12, num_layers=2, resnet_eps=1e-6, resnet_groups=4, add_downsample=resample, downsample_padding=0
    )
    theirs = randomise(theirs, seed=3)
    ours = to_flax(lambda r: Stage(8, 12, 2, 4, resample="down" if resample else None, rngs=r), theirs, tmp_path)
    x = tensor(2, 8, 5, 6)
    assert difference(run(call, ours, nhwc(x)), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("resample", [True, False])
def test_decoder_stage(resample, tmp_path):
    theirs = UpDecoderBlock2D(12, 8, num_layers=2, resnet_eps=1e-6, resnet_groups=4, add_upsample=resample)
    theirs = randomise(theirs, seed=4)
    ours = to_flax(lambda r: Stage(12, 8, 2, 4, resample="up" if resample else None, rngs=r), theirs, tmp_path)
    x = tensor(2, 12, 3, 5)
    assert difference(run(call, ours, nhwc(x)), theirs(x)) <= TOLERANCE


@pytest.fixture(scope="session", params=VAES)
def vaes(request, tmp_path_factory):
    theirs = torch_vae(request.param)
    config = VAEConfig.from_json(dict(theirs.config))
    return request.param, theirs, to_flax(lambda r: VAE(config, rngs=r), theirs, tmp_path_factory.mktemp("vae"))


def test_encode(vaes):
    name, theirs, ours = vaes
    images = tensor(2, theirs.config.in_channels, *VAE_SIZES[name])
    encoded, moments = run(lambda m, x: (m.encoder(x), m.encode(x)), ours, nhwc(images))
    assert difference(encoded, theirs.encoder(images)) <= TOLERANCE

    distribution = theirs.encode(images).latent_dist
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    assert difference(mean, distribution.mean) <= TOLERANCE
    assert difference(log_variance, distribution.logvar) <= TOLERANCE


def test_decode(vaes):
    name, theirs, ours = vaes
    latents = tensor(2, theirs.config.latent_channels, *(max(side // 4, 3) for side in VAE_SIZES[name]), seed=1)
    got = run(lambda m, z: m.decode(z), ours, nhwc(latents))
    assert difference(got, theirs.decode(latents).sample) <= TOLERANCE


def test_downscale(vaes):
    name, theirs, ours = vaes
    size = theirs.encode(tensor(1, theirs.config.in_channels, 16, 16)).latent_dist.mean.shape[-1]
    assert 16 // ours.config.downscale == size


def test_log_variance_is_clamped_like_diffusers(tmp_path):
    theirs = torch_vae("flat")
    theirs.quant_conv.bias[4:] = theirs.quant_conv.bias.new_tensor([100.0, -100.0, 19.0, 0.0])
    config = VAEConfig.from_json(dict(theirs.config))
    ours = to_flax(lambda r: VAE(config, rngs=r), theirs, tmp_path)
    images = tensor(2, 1, 3, 5)
    log_variance = run(lambda m, x: m.encode(x), ours, nhwc(images))[..., 4:]
    assert float(log_variance[..., 0].min()) == 20.0
    assert float(log_variance[..., 1].max()) == -30.0
    assert difference(log_variance, theirs.encode(images).latent_dist.logvar) <= TOLERANCE


def test_sample_latents_matches_the_distribution_of_diffusers():
    theirs = torch_vae("shallow")
    distribution = theirs.encode(tensor(2, 3, 8, 8)).latent_dist
    noise = tensor(*distribution.mean.shape, seed=9)
    expected = (distribution.mean + distribution.std * noise) * theirs.config.scaling_factor
    got = sample_latents(nhwc(distribution.parameters), nhwc(noise), theirs.config.scaling_factor)
    assert difference(got, expected) <= TOLERANCE


def test_latent_noise_has_half_the_channels_and_unit_variance():
    noise = latent_noise(jax.random.key(0), jnp.zeros((8, 32, 16, 6)))
    assert noise.shape == (8, 32, 16, 3)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.0, 1.0], atol=0.03)  # 12,288 draws: 3 standard errors
