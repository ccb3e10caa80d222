"""The gate by categories: whether a prompt asks for what a user bans, in two halves that can be read and moved apart.

    p_k = σ(logΣ_t exp(f_k(e_t)))    does the prompt ask for category k, from its text states e
    b_k = σ(h_k(u))                  does the user ban category k, from the user's embedding u
    g = 1 − Π_k (1 − p_k·b_k)

f and h have one hidden layer. A server needs the seven numbers b_k of a user, not the embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.categories import CATEGORIES
from psa_jax.models.adapter_config import GATE_HIDDEN
from psa_jax.models.attention import gelu


class HiddenLayer(nnx.Module):
    """W_2 gelu(W_1 x + b_1) + b_2 on the last axis, in float32.

    Args:
      inner, outer: widths of input and output.
      param: class of the parameters.
    """

    def __init__(self, inner: int, outer: int, param: type[nnx.Param], *, rngs: nnx.Rngs):
        def kernel(fan_in: int, fan_out: int) -> nnx.Param:
            normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            return param(normal(rngs.params(), (fan_in, fan_out)))

        self.first, self.first_bias = kernel(inner, GATE_HIDDEN), param(jnp.zeros(GATE_HIDDEN))
        self.second, self.second_bias = kernel(GATE_HIDDEN, outer), param(jnp.zeros(outer))

    def __call__(self, x: Float[Array, "b *s i"]) -> Float[Array, "b *s o"]:
        """Outputs for each row of inputs."""
        one = (None,) * (x.ndim - 1)
        hidden = gelu(x @ self.first[...] + self.first_bias[...][one])
        return hidden @ self.second[...] + self.second_bias[...][one]


class CategoryGate(nnx.Module):
    """Both halves of the gate.

    Args:
      user_dim: length of a user embedding.
      cross_dim: width of the text states.
      param: class of the parameters.
    """

    def __init__(self, user_dim: int, cross_dim: int, param: type[nnx.Param], *, rngs: nnx.Rngs):
        self.user = HiddenLayer(user_dim, len(CATEGORIES), param, rngs=rngs)
        self.prompt = HiddenLayer(cross_dim, len(CATEGORIES), param, rngs=rngs)

    def ban_logits(self, user: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """Logits of b_k for each user and category."""
        return self.user(user.astype(jnp.float32))

    def category_logits(self, text: Float[Array, "b s c"]) -> Float[Array, "b k"]:
        """Logits of p_k for each prompt and category."""
        return jax.nn.logsumexp(self.prompt(text.astype(jnp.float32)), axis=1)

    def parts(self, text: Float[Array, "b s c"], user: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """p_k·b_k for each prompt with its user, by category."""
        return jax.nn.sigmoid(self.category_logits(text)) * jax.nn.sigmoid(self.ban_logits(user))


def combine(parts: Float[Array, "b k"]) -> Float[Array, " b"]:
    """g = 1 − Π_k (1 − part_k)."""
    return 1.0 - jnp.prod(1.0 - parts, axis=-1)
