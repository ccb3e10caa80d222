"""Preference losses over denoising errors: pure functions of one pair's four errors, in float32.

pw, pl are the policy's mean squared errors on the chosen (winner) and the rejected (loser) image, rw, rl the
reference's; see `psa_jax.preference.objective` for how they come about.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def margin(
    pw: Float[Array, " b"], pl: Float[Array, " b"], rw: Float[Array, " b"], rl: Float[Array, " b"], beta: float
) -> Float[Array, " b"]:
    """z = (β/2)·((pl − rl) − (pw − rw)): how much more the policy favours the winner than the reference does.

    Source: Diffusion-DPO, arXiv 2311.12908, eq. 14, with errors as means over the latent (β is larger for means).
    """
    return 0.5 * beta * ((pl - rl) - (pw - rw))


def sigmoid(z: Float[Array, " b"]) -> Float[Array, " b"]:
    """−log σ(z): ln 2 at z = 0. Source: Diffusion-DPO, arXiv 2311.12908."""
    return -jax.nn.log_sigmoid(z)


def sft_anchor(pw: Float[Array, " b"], rw: Float[Array, " b"]) -> Float[Array, " b"]:
    """pw − rw: keeps the winner from getting worse, which the sigmoid loss alone permits. Zero at initialisation."""
    return pw - rw


def accuracy(z: Float[Array, " b"]) -> Float[Array, ""]:
    """Share of pairs with z > 0; a tie counts ½."""
    return jnp.mean(jnp.where(z > 0, 1.0, jnp.where(z < 0, 0.0, 0.5)))
