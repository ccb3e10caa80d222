"""What is stored and in which numbers: remat changes memory alone, bfloat16 little, and nothing at the start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psa_jax.models.attention import REMAT


@pytest.fixture(scope="module")
def one_step(make_training):
    """Returns a function: remat -> (gradient by name, bytes of temporary memory of the compiled step)."""

    def run(remat):
        training = make_training(optimizer=optax.sgd(1.0), trained=True, remat=remat)
        before = jax.device_get(training.state.params)
        arguments = training.state, training.frozen, training.batch, training.key
        compiled = training.step.lower(*arguments).compile()
        state, _ = compiled(*arguments)
        memory = compiled.memory_analysis().temp_size_in_bytes
        return {name: before[name] - np.asarray(value) for name, value in state.params.items()}, memory

    return run


@pytest.fixture(scope="module")
def everything_stored(one_step):
    return one_step("none")


@pytest.mark.parametrize("remat", sorted(REMAT.keys() - {"none"}))
def test_remat_needs_less_memory_for_the_same_gradient(one_step, everything_stored, remat):
    (wanted, most), (gradient, memory) = everything_stored, one_step(remat)
    print(f"\n{remat}: {memory / most:.2f} of the temporary memory")
    assert memory < 0.9 * most
    for name, value in wanted.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_bfloat16_starts_at_ln_2(make_training):
    """The untrained policy and the reference round alike here; what is kept is float32.

    Without NO_EXCESS_PRECISION the largest margin is 0.036.
    """
    training = make_training(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(training.frozen.weights)} == {jnp.dtype(jnp.bfloat16)}
    (first, *_), state = training.run(2)
    assert first["max_abs_margin"] <= 1e-3
    assert abs(first["loss"] - math.log(2)) <= 1e-5
    kept = jax.tree.leaves((state.params, state.opt_state))
    assert {leaf.dtype for leaf in kept if leaf.ndim} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_near_float32(make_training):
    """Of a trained adapter, at β = 20: loss and gradient within 2 percent."""
    (wide,), (narrow,) = (make_training(trained=True, dtype=dtype).run(1)[0] for dtype in (jnp.float32, jnp.bfloat16))
    print(f"\nfloat32 {wide}\nbfloat16 {narrow}")
    assert narrow["loss"] != wide["loss"]
    for name in ("loss", "gradient_norm"):
        assert narrow[name] == pytest.approx(wide[name], rel=0.02), name
