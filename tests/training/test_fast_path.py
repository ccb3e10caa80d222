"""What makes a step fast changes no loss: kernels and blocks of attention, norms by hand, convolutions as products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from psa_jax.models import conv, fused_attention, norms
from psa_jax.models.attention import attend
from psa_jax.training import setup as training_setup
from psa_jax.training.sharding import by_rows
from psa_jax.training.step import draw_inputs, gradient


def textbook_layer_norm(x, scale, bias, eps):
    states = x.astype(jnp.float32)
    mean = states.mean(axis=-1, keepdims=True)
    variance = ((states - mean) ** 2).mean(axis=-1, keepdims=True)
    out = (states - mean) / jnp.sqrt(variance + eps) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def textbook_group_norm(x, scale, bias, groups, eps, silu):
    grouped = x.astype(jnp.float32).reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    normal = ((grouped - mean) / jnp.sqrt(variance + eps)).reshape(x.shape)
    out = normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return (jax.nn.silu(out) if silu else out).astype(x.dtype)


@pytest.fixture
def plainly(monkeypatch):
    """Returns a function that puts the textbook in place of what is fast; what is compiled after it is plain."""

    def replace():
        monkeypatch.setattr(training_setup, "fused_attention", lambda *where: attend)
        monkeypatch.setattr(norms, "_layer_norm", jax.numpy_rank_promotion("allow")(textbook_layer_norm))
        monkeypatch.setattr(norms, "_group_norm", jax.numpy_rank_promotion("allow")(textbook_group_norm))
        monkeypatch.setattr(conv.PixelwiseConv, "__call__", nnx.Conv.__call__)
        monkeypatch.setattr(conv.Conv, "__call__", nnx.Conv.__call__)

    return replace


@pytest.fixture
def short(monkeypatch):
    """The 64 pixels of the small model are many enough for blocks, and for a kernel, which pads them."""
    monkeypatch.setattr(fused_attention, "_LONG", 64)
    monkeypatch.setattr(fused_attention, "_QUERIES", 24)


def losses_and_gradient(training):
    """Of each pair, and by the adapter's arrays, as the step has them."""
    setup = training.setup

    @functools.partial(jax.jit, compiler_options=setup.compiler_options)
    def of_step(params, frozen, batch, key):
        pairs, shared = setup.batch.split(batch)
        return gradient(setup, params, frozen, draw_inputs(setup, frozen, pairs, key), shared)

    grads, found = of_step(training.state.params, training.frozen, training.batch, training.key)
    return np.asarray(found.values["loss"]), {name: np.asarray(value) for name, value in grads.items()}


@pytest.mark.parametrize("remat", ["none", "projections"])
def test_float32_is_that_of_the_textbook(make_training, plainly, short, remat):
    losses, grads = losses_and_gradient(make_training(trained=True, remat=remat))
    plainly()
    wanted, wanted_grads = losses_and_gradient(make_training(trained=True))
    assert np.ptp(wanted) > 0.01  # pairs differ
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for name, value in wanted_grads.items():
        np.testing.assert_allclose(grads[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_bfloat16_is_as_near_to_float32_as_the_textbook_is(make_training, plainly, short, monkeypatch):
    """With the TPU's kernel, interpreted. Each rounding is up to 2⁻⁹ of a number: the fast path has no more of them."""
    narrow = make_training(trained=True, dtype=jnp.bfloat16, pairs=2)
    mesh, rows = narrow.setup.mesh, by_rows(narrow.setup.mesh).spec

    def kernel(query, key, value, heads):
        """A picture at a time: interpreted kernels take no batch."""
        one = functools.partial(fused_attention._on_tpu, mesh, rows)
        return jax.lax.map(lambda row: one(*(x[None] for x in row), heads)[0], (query, key, value))

    with monkeypatch.context() as on_tpu, pltpu.force_tpu_interpret_mode():
        on_tpu.setattr(training_setup, "fused_attention", lambda *where: kernel)
        fast, fast_grads = losses_and_gradient(narrow)
    plainly()
    plain, plain_grads = losses_and_gradient(narrow)
    exact, exact_grads = losses_and_gradient(make_training(trained=True, pairs=2))

    def distance(found, grads):
        of_grads = [np.linalg.norm(grads[name] - value) / np.linalg.norm(value) for name, value in exact_grads.items()]
        return np.linalg.norm(found - exact), max(of_grads)

    (of_fast, steepest), (of_plain, theirs) = distance(fast, fast_grads), distance(plain, plain_grads)
    print(f"\nlosses {of_fast:.2e} from float32, the textbook's {of_plain:.2e}; gradients {steepest:.2e}, {theirs:.2e}")
    assert not np.array_equal(fast, plain)
    assert of_fast <= 1.5 * of_plain and steepest <= 1.5 * theirs
