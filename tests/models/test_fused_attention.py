"""The kernels for self-attention give what `attend` gives; what they need is seen in what is handed to the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from psa_jax.models import fused_attention
from psa_jax.models.attention import attend

HEADS, ROWS = 2, PartitionSpec(("data", "fsdp"))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])


def draw(pixels, width, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, pixels, HEADS * width)), dtype) for _ in range(3)]


def on_tpu(mesh):
    return lambda q, k, v: fused_attention._on_tpu(mesh, ROWS, q, k, v, HEADS)


def plain(query, key, value):
    return attend(query, key, value, HEADS)


@pytest.mark.parametrize(("pixels", "width"), [(1024, 40), (1152, 64)])
def test_the_tpu_kernel_gives_what_attend_gives(mesh, pixels, width):
    """Interpreted, on two devices; the distance to float32 is that of `attend` in bfloat16, gradients included."""
    inputs = draw(pixels, width)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def gradients(function, inputs):
        def total(*inputs):
            out = function(*inputs)
            return jnp.sum(out.astype(jnp.float32) * probe), out

        found, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return [np.asarray(x, np.float32) for x in (out, *found)]

    with pltpu.force_tpu_interpret_mode():
        ours = gradients(on_tpu(mesh), inputs)
    rounded, exact = gradients(plain, inputs), gradients(plain, [x.astype(jnp.float32) for x in inputs])
    for mine, theirs, wanted in zip(ours, rounded, exact, strict=True):
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(mine - wanted) <= 1.5 * np.linalg.norm(theirs - wanted) + 1e-3 * size
        assert np.linalg.norm(mine - wanted) <= 0.02 * size


@pytest.mark.parametrize(
    ("pixels", "dtype", "kernels"),
    [(4096, jnp.bfloat16, 1), (4096, jnp.float32, 0), (256, jnp.bfloat16, 0), (1100, jnp.bfloat16, 0)],
)
def test_a_tpu_gets_the_kernel_where_it_fits(mesh, pixels, dtype, kernels):
    """Lowered for a TPU, of which there is none here: Mosaic's call is in the program, or plain products are."""
    traced = jax.jit(on_tpu(mesh)).trace(*draw(pixels, 40, dtype))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == kernels


def test_gpus_with_a_kernel():
    capabilities = ("8.0", "9.0", "10.3", "7.5", "gfx90a", "")
    assert [fused_attention._has_cudnn(each) for each in capabilities] == [True, True, True, False, False, False]


def test_a_cpu_computes_plainly(mesh):
    assert fused_attention.fused_attention(mesh, ROWS) is attend


def test_a_gpu_gets_no_kernel_where_none_fits():
    for pixels, width, dtype in ((1024, 40, jnp.float32), (256, 40, jnp.bfloat16), (1024, 160, jnp.bfloat16)):
        inputs = draw(pixels, width, dtype)
        assert jnp.array_equal(fused_attention._on_gpu(*inputs, HEADS), plain(*inputs))
