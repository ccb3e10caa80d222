"""Names of layers in the lowered program: profiles and cost by part go by them."""

import re

import jax
import jax.numpy as jnp
from support.torch_models import UNETS

from psa_jax.diffusion.conditioning import encode_text
from psa_jax.interop.weights import abstract_model
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.attention import ComputeOptions
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE

UNET = UNetConfig(**UNETS["sd1_shape"])
TEXT = CLIPTextConfig(
    vocab_size=20, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=19
)
LATENTS = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)


def names_in(function, *arguments) -> str:
    """All locations of a lowered function, one a line."""
    text = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    return "\n".join(sorted(set(re.findall(r'loc\("([^"]*)"', text))))


def predict(unet, adapter, encoder, user, latents):
    text = encode_text((encoder,), (jnp.zeros((1, 7), jnp.int32),)).states
    return unet(latents, jnp.ones(1), adapter(unet, text, user, jnp.ones(1)))


def models(kind: str) -> tuple:
    adapter = AdapterConfig.for_unet(UNET, user_dim=5, kind=kind)
    user = jax.ShapeDtypeStruct((1, 5), jnp.float32)
    return abstract_model(UNet, UNET), abstract_model(Adapter, adapter), abstract_model(CLIPText, TEXT), user, LATENTS


def test_layers_of_a_prediction():
    found = names_in(predict, *models("concept"))
    block = "attentions_1/.*{}/.*dot_general"
    for path in (
        "text_encoder/layers_1/.*dot_general",
        "text_encoder/layers_1/attention/.*dot_general",
        "text_encoder/layers_1/norm/",
        "adapter/user_projection/.*dot_general",
        "adapter/user_contexts/.*dot_general",
        "unet/contexts/.*dot_general",
        "unet/time_embedding/.*dot_general",
        "unet/down_blocks_0/resnets_1/",
        "unet/down_blocks_0/resnets_1/norm/",
        "unet/down_blocks_1/" + block.format("cross_attention/attention"),
        "unet/down_blocks_1/attentions_1/.*cross_attention/norm/",
        "unet/down_blocks_1/" + block.format("self_attention"),
        "unet/down_blocks_1/" + block.format("cross_attention"),
        "unet/down_blocks_1/" + block.format("cross_attention/user_attention"),
        "unet/down_blocks_1/" + block.format("feed_forward"),
        "unet/down_blocks_2/downsamplers_0/",
        "unet/mid_block/attentions_0/.*self_attention/",
        "unet/mid_block/resnets_1/",
        "unet/up_blocks_0/upsamplers_0/",
        "unet/up_blocks_1/resnets_2/",
        "unet/up_blocks_3/attentions_2/.*cross_attention/user_attention/",
        "unet/conv_out/",
    ):
        assert re.search(path, found), path
    assert "up_blocks_4" not in found and "down_blocks_4" not in found


def test_layers_in_a_gradient_with_rematerialization():
    def loss(adapter, unet, *rest):
        return predict(unet, adapter, *rest).sum()

    unet, adapter, *rest = models("text")
    unet.compute = ComputeOptions("full")
    found = names_in(jax.grad(loss), adapter, unet, *rest)
    backward = "\n".join(line for line in found.splitlines() if "transpose" in line)
    for path in ("down_blocks_1/attentions_0/.*cross_attention/", "mid_block/resnets_0/", "up_blocks_3/resnets_1/"):
        assert re.search(path, backward), path
    assert (
        "cross_attention/user_attention" not in found
    )  # the text kind changes values, and adds no attention to the UNet


def test_layers_of_the_autoencoder():
    vae = abstract_model(VAE, VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2))
    found = names_in(lambda vae, latents: vae.encode(vae.decode(latents)), vae, LATENTS)
    for path in (
        "vae_encode/down_blocks_1/",
        "vae_encode/mid_block/",
        "vae_encode/mid_block/attention/",
        "vae_decode/mid_block/",
        "vae_decode/up_blocks_0/",
    ):
        assert path in found, path
