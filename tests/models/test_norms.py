"""Norms against torch's: results, gradients, and the digits that are left where the mean is far from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from support.torch_models import nhwc, tensor

from psa_jax.models.norms import group_norm, layer_norm, moments


def with_gradients(norm, x, **options):
    """The norm of `x`, and the gradients of a sum of sines in x, scale and bias."""

    def loss(norm, x):
        out = norm(x, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), (of_norm, of_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(norm, x)
    return [np.asarray(each) for each in (out, of_x, of_norm.scale[...], of_norm.bias[...])]


def theirs_with_gradients(function, x, width):
    """The same in torch, in float64."""
    with torch.enable_grad():
        x, scale, bias = (each.double().detach().requires_grad_() for each in (x, *affine(width)))
        out = function(x, scale, bias)
        out.sin().sum().backward()
    return out.detach(), x.grad, scale.grad, bias.grad


def affine(width):
    return torch.linspace(0.5, 2.0, width), torch.linspace(-1.0, 1.0, width)


def with_affine(norm, width):
    norm.scale[...], norm.bias[...] = (jnp.asarray(each.numpy()) for each in affine(width))
    return norm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_as_in_torch(silu, mean):
    x = tensor(2, 12, 5, 7) + mean * torch.arange(12.0).reshape(1, 12, 1, 1)
    norm = with_affine(group_norm(12, 4, nnx.Rngs(0), 1e-5), 12)
    ours = with_gradients(norm, nhwc(x), silu=silu)

    def function(x, scale, bias):
        out = F.group_norm(x, 4, scale, bias, 1e-5)
        return F.silu(out) if silu else out

    wanted = theirs_with_gradients(function, x, 12)
    wanted = [each.permute(0, 2, 3, 1) if each.ndim == 4 else each for each in wanted]
    for got, each in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(got, each, rtol=1e-4, atol=2e-5 * float(each.abs().max()))


def test_layer_norm_as_in_torch():
    x = tensor(2, 5, 12) + 100.0
    ours = with_gradients(with_affine(layer_norm(12, nnx.Rngs(0)), 12), jnp.asarray(x.numpy()))
    wanted = theirs_with_gradients(lambda x, *of: F.layer_norm(x, (12,), *of, 1e-5), x, 12)
    for got, each in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(got, each, rtol=1e-4, atol=2e-5 * float(each.abs().max()))


def test_the_variance_keeps_its_digits_where_the_mean_is_large():
    """At a mean of 10,000 standard deviations the shifted variance has five digits, E[x²] − E[x]² none."""
    x = jnp.asarray(1e4 + np.random.default_rng(0).normal(size=(1, 32, 32, 8)), jnp.float32)
    exact = np.asarray(x, np.float64).reshape(1, -1, 4, 2).var(axis=(1, 3))
    _, variance = jax.jit(moments, static_argnums=1)(x, 4)
    by_squares = (x**2).reshape(1, -1, 4, 2).mean((1, 3)) - x.reshape(1, -1, 4, 2).mean((1, 3)) ** 2
    assert np.abs(variance / exact - 1).max() < 1e-5
    assert np.abs(by_squares / exact - 1).max() > 1.0


def test_an_outlier_in_the_first_row_costs_few_digits():
    """The worst case of the shift: all of the variance is one pixel of the row whose mean is subtracted."""
    x = np.zeros((1, 64, 64, 4), np.float32)
    x[0, 0, 0] = 1e3
    exact = x.astype(np.float64).reshape(1, -1, 2, 2).var(axis=(1, 3))
    _, variance = moments(jnp.asarray(x), 2)
    np.testing.assert_allclose(variance, exact, rtol=1e-5)


def test_gradients_keep_states_in_their_own_type():
    """What the backward pass of a bfloat16 norm holds in float32 has no row a pixel."""
    x = jnp.zeros((2, 8, 8, 32), jnp.bfloat16)
    norm = group_norm(32, 8, nnx.Rngs(0), 1e-5)
    _, back = jax.vjp(lambda x: norm(x, silu=True), x)
    large = [leaf for leaf in jax.tree.leaves(back) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]
