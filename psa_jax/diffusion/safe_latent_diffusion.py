"""Safe Latent Diffusion: guidance away from a concept that is said in words, for every user alike.

It needs no training and no adapter, so it is the usual baseline of methods that train. A third prediction ε_S, for the
concept, joins ε_∅ and ε of classifier-free guidance:

    μ = min(1, s·|ε − ε_S|) where ε − ε_S < λ, else 0          how much of the concept is in the picture, by element
    γ = μ·(ε_S − ε_∅) + s_m·ν
    ν ← β·ν + (1 − β)·γ
    g = ε_∅ + w·(ε − ε_∅ − γ)                                   γ counts only after the first δ calls; ν always

Source: P. Schramowski et al., Safe Latent Diffusion, CVPR 2023, arXiv 2211.05105, section 3.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.diffusion.samplers import rescaled
from psa_jax.diffusion.sld_strengths import Strength


class Memory(NamedTuple):
    """What goes from one call of the model to the next.

    Attributes:
      momentum: ν, 0 at the start.
      call: number of calls before this one.
    """

    momentum: Float[Array, "b h w c"]
    call: Int[Array, ""]


def no_memory(latents: Float[Array, "b h w c"]) -> Memory:
    """The memory before the first call, for latents of this shape."""
    return Memory(jnp.zeros_like(latents, jnp.float32), jnp.int32(0))


def guide_safely(
    without: Float[Array, "b h w c"],
    with_prompt: Float[Array, "b h w c"],
    with_concept: Float[Array, "b h w c"],
    guidance: Float[Array, ""],
    rescale: Float[Array, ""],
    strength: Strength,
    memory: Memory,
) -> tuple[Float[Array, "b h w c"], Memory]:
    """Guided output of one call, and the memory for the next.

    Args:
      without, with_prompt, with_concept: the model's outputs ε_∅, ε and ε_S.
      guidance, rescale: w and φ, as for `samplers.guide`.
      strength: one of `sld_strengths.STRENGTHS`, or another.
      memory: of the call before.
    """
    apart = with_prompt - with_concept
    share = jnp.where(apart < strength.threshold, jnp.minimum(strength.scale * jnp.abs(apart), 1.0), 0.0)
    away = share * (with_concept - without) + strength.momentum_scale * memory.momentum
    momentum = strength.momentum_decay * memory.momentum + (1.0 - strength.momentum_decay) * away
    counted = jnp.where(memory.call >= strength.warmup, away, 0.0)
    guided = without + guidance * (with_prompt - without - counted)
    return rescaled(guided, with_prompt, rescale), Memory(momentum, memory.call + 1)
