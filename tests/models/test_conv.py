"""Convolutions against torch's, on both sides of the choice between a convolution and a matrix product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from support.torch_models import nhwc, tensor

from psa_jax.models.conv import Conv

SIDES = ((1, 1), (1, 1))
CASES = {  # stride, padding, height, width
    "plain": (1, SIDES, 5, 3),
    "two by two": (1, SIDES, 2, 2),
    "one pixel": (1, SIDES, 1, 1),
    "strided": (2, SIDES, 5, 4),
    "strided, padded right and below": (2, ((0, 1), (0, 1)), 4, 5),
}


def make(stride, padding, wide: int) -> Conv:
    return Conv(6, wide, (3, 3), strides=stride, padding=padding, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("wide", [4, 128], ids=["more pixels than channels", "fewer"])
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_as_in_torch(name, wide):
    stride, padding, *size = CASES[name]
    conv = make(stride, padding, wide)
    conv.bias[...] = jnp.linspace(-1.0, 1.0, wide)
    x = tensor(2, 6, *size)

    def loss(conv, x):
        out = conv(x)
        return jnp.sum(jnp.sin(out)), out

    (_, ours), (of_conv, of_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(conv, nhwc(x))
    with torch.enable_grad():
        x.requires_grad_()
        kernel = torch.from_numpy(np.array(conv.kernel[...])).permute(3, 2, 0, 1).requires_grad_()
        (top, bottom), (left, right) = padding
        out = F.conv2d(F.pad(x, (left, right, top, bottom)), kernel, torch.linspace(-1.0, 1.0, wide), stride=stride)
        out.sin().sum().backward()
    pairs = {
        "result": (ours, out.detach().permute(0, 2, 3, 1)),
        "gradient in the picture": (of_x, x.grad.permute(0, 2, 3, 1)),
        "gradient in the kernel": (of_conv.kernel[...], kernel.grad.permute(2, 3, 1, 0)),
    }
    for what, (got, wanted) in pairs.items():
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=what)


def test_products_are_for_small_pictures_on_a_cpu_alone():
    def program(size: int, platform: str) -> str:
        conv, x = make(1, SIDES, 32), jnp.zeros((1, size, size, 6))
        return jax.jit(conv.__call__).trace(x).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" not in program(4, "cpu")
    for size, platform in ((8, "cpu"), (4, "tpu"), (4, "cuda")):
        assert "stablehlo.convolution" in program(size, platform)
