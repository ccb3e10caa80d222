"""Baked export: a plain UNet with one user's adapter in its weights, for adapters with one token.

With one token every kind in the cross-attentions adds the constant s·W_v z before `to_out`. The bias can hold it:

    to_out.bias += s · W_out W_v z
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.errors import PSAError
from psa_jax.models.adapter import Adapter
from psa_jax.models.unet import UNet


def bake(unet: UNet, adapter: Adapter, user: Float[Array, "1 d"], scale: float = 1.0) -> UNet:
    """UNet of the same configuration that generates for one user, on both sides of guidance.

    Args:
      unet: the base model's.
      adapter: with one token, in the cross-attentions.
      user: the user's embedding.
      scale: strength s.

    Raises:
      PSAError: an adapter whose effect depends on pixel or prompt; no bias can hold it.
    """
    config = adapter.config
    if config.tokens != 1 or config.before_unet:
        raise PSAError(
            f"a plain UNet cannot hold an adapter of kind {config.kind!r} with {config.tokens} tokens (only 1 token in "
            "the cross-attentions); export it with --format=native and load it with psa_jax.torch (load_psa)"
        )
    baked = jax.tree.map(lambda leaf: leaf, unet)  # merge(split(unet)) would share its variables
    (z,) = adapter.user_proj(user)  # [1 token, C]
    layers = iter(adapter.layers)
    for block in [*baked.down_blocks, *baked.up_blocks, baked.mid_block]:
        for stack in block.attentions:
            out = stack.transformer_blocks.attn2.to_out_0  # every parameter with a leading axis: the blocks of a stack
            values = jnp.concatenate([z @ next(layers).to_v[...] for _ in range(stack.depth)])  # [depth, width]
            kernel = out.kernel[...].astype(jnp.float32)
            shift = scale * jnp.einsum("LI,LIO->LO", values, kernel, precision="highest")
            out.bias[...] = (out.bias[...].astype(jnp.float32) + shift).astype(out.bias.dtype)
    return baked
