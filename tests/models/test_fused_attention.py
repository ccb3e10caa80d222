"""Self-attention without its weights in memory gives what `attend` gives, in programs that hold a kernel or a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from psa_jax.models import fused_attention
from psa_jax.models.attention import Attention, ComputeOptions, attend, remat

HEADS, ROWS = 2, PartitionSpec(("data", "fsdp"))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])


def draw(pixels, width, dtype=jnp.bfloat16, keys=None):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, n, HEADS * width)), dtype) for n in (pixels, *[keys or pixels] * 2)]


def on_tpu(mesh):
    return lambda q, k, v: fused_attention._on_tpu(mesh, ROWS, q, k, v, HEADS)


def in_blocks(query, key, value):
    return fused_attention._without_kernel(query, key, value, HEADS)


def plain(query, key, value):
    return attend(query, key, value, HEADS)


def self_attention() -> Attention:
    made = nnx.eval_shape(lambda: Attention(HEADS * 40, HEADS, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), made)


def with_kernel(policy: str, kernel):
    """Self-attention of a picture's states by a kernel, under a rematerialization policy."""
    run = remat(Attention.__call__, ComputeOptions(policy), attend=kernel)
    return functools.partial(run, self_attention())


def with_gradients(function, inputs):
    """The output, and the gradients of its product with fixed random numbers."""
    probe = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(*inputs):
        out = function(*inputs)
        return jnp.sum(out.astype(jnp.float32) * probe), out

    found, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x, np.float32) for x in (out, *found)]


@pytest.mark.parametrize(("pixels", "width"), [(512, 40), (768, 64), (500, 80), (512, 160)])
def test_the_tpu_kernel_gives_what_attend_gives(mesh, monkeypatch, pixels, width):
    """Interpreted, on two devices; the distance to float32 is that of `attend` in bfloat16, gradients included."""
    monkeypatch.setattr(fused_attention, "_LONG", 256)  # fewer pixels than a kernel pays for, to be quick
    monkeypatch.setattr(fused_attention, "_OTHER_TILES", fused_attention._Tiles(256, 512, 256, 512))
    inputs = draw(pixels, width)
    with pltpu.force_tpu_interpret_mode():
        ours = with_gradients(on_tpu(mesh), inputs)
    rounded, exact = with_gradients(plain, inputs), with_gradients(plain, [x.astype(jnp.float32) for x in inputs])
    for mine, theirs, wanted in zip(ours, rounded, exact, strict=True):
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(mine - wanted) <= 1.5 * np.linalg.norm(theirs - wanted) + 1e-3 * size
        assert np.linalg.norm(mine - wanted) <= 0.02 * size


@pytest.mark.parametrize(
    ("pixels", "keys", "dtype", "kernels"),
    [
        (4096, 4096, jnp.bfloat16, 1),
        (4032, 4032, jnp.bfloat16, 1),
        (4096, 4096, jnp.float32, 0),
        (256, 256, jnp.bfloat16, 0),
        (4096, 77, jnp.bfloat16, 0),
    ],
)
def test_a_tpu_gets_the_kernel_where_it_fits(mesh, pixels, keys, dtype, kernels):
    """Lowered for a TPU, of which there is none here: Mosaic's call is in the program, or plain products are."""
    traced = jax.jit(on_tpu(mesh)).trace(*draw(pixels, 40, dtype, keys))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == kernels


def test_where_devices_work_on_their_own_each_has_the_kernel(mesh):
    """In the caller's `jax.shard_map`, which cannot hold another one of the same axes."""
    own = jax.shard_map(on_tpu(mesh), mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)

    def kernels(function) -> int:
        gradient = jax.jit(jax.grad(lambda *inputs: jnp.sum(function(*inputs).astype(jnp.float32))))
        program = gradient.trace(*draw(1024, 40)).lower(lowering_platforms=("tpu",))
        return program.as_text().count("tpu_custom_call")

    assert kernels(own) == kernels(on_tpu(mesh)) == 2


def test_pixels_are_padded_to_what_large_tiles_divide():
    tiles = fused_attention._Tiles(512, 4608, 1024, 4608)
    padded = {1024: 1024, 1152: 1152, 1408: 1536, 4032: 4096, 4096: 4096, 4736: 4864, 9216: 9216}
    assert {pixels: fused_attention._padded(pixels, tiles) for pixels in padded} == padded


@pytest.mark.parametrize("pixels", [1024, 1100])
def test_blocks_of_queries_give_what_attend_gives(pixels):
    """Each query's weights are its own. The gradients of keys and values are summed in another order."""
    inputs = draw(pixels, 40, jnp.float32)
    ours, theirs = with_gradients(in_blocks, inputs), with_gradients(plain, inputs)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_blocks_never_hold_all_weights():
    """The largest array of the gradient's program is one block's weights, not those of all queries."""
    inputs = draw(4096, 40, jnp.float32)

    def largest(function):
        def total(*inputs):
            return jnp.sum(function(*inputs))

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights = 2 * HEADS * 4096**2 * 4
    assert largest(in_blocks) < weights <= largest(plain)


@pytest.mark.parametrize(
    ("policy", "stored"), [("none", True), ("dots", False), ("projections", True), ("kernels", True), ("full", False)]
)
def test_what_the_tpu_kernel_leaves_for_the_backward_pass(mesh, capsys, policy, stored):
    """Its output, and a number a head and pixel: where they are stored it does not run again."""
    compute = with_kernel(policy, functools.partial(fused_attention._on_tpu, mesh, ROWS))
    jax.ad_checkpoint.print_saved_residuals(compute, jnp.zeros((2, 1024, HEADS * 40), jnp.bfloat16))
    assert (f"f32[2,{HEADS},1024]" in capsys.readouterr().out) is stored


@pytest.mark.parametrize(
    ("policy", "runs"), [("none", 1), ("dots", 2), ("projections", 1), ("kernels", 1), ("full", 2)]
)
def test_what_cudnn_leaves_for_the_backward_pass(monkeypatch, policy, runs):
    """Traced for a GPU, of which there is none here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *about: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *about: True)
    compute = with_kernel(policy, fused_attention._on_gpu)

    def total(x):
        return jnp.sum(compute(x).astype(jnp.float32))

    traced = str(jax.jit(jax.grad(total)).trace(jnp.zeros((2, 1024, HEADS * 40), jnp.bfloat16)).jaxpr)
    kernels = [traced.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd")]
    assert kernels == [runs, 1]


def test_gpus_with_a_kernel():
    capabilities = ("8.0", "9.0", "10.3", "7.5", "gfx90a", "")
    assert [fused_attention._has_cudnn(each) for each in capabilities] == [True, True, True, False, False, False]


def test_a_cpu_computes_in_blocks(mesh):
    assert fused_attention.fused_attention(mesh, ROWS) is fused_attention._without_kernel


def test_a_gpu_gets_no_kernel_where_none_fits():
    for pixels, width, dtype in ((1024, 40, jnp.float32), (256, 40, jnp.bfloat16), (1024, 160, jnp.bfloat16)):
        inputs = draw(pixels, width, dtype)
        assert jnp.array_equal(fused_attention._on_gpu(*inputs, HEADS), in_blocks(*inputs))
