"""The training step: ln 2 at the start, the same on every mesh and in parts, only the adapter changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psa_jax.errors import PSAError
from psa_jax.preference import losses

STEPS = 10
# Sums taken in another order round the four errors of a pair (near 2, at most 4) to float32: each moves by some 2⁻²⁴ of
# itself, with `mean_in_any_order`. A gap is the difference of two of them; the margin is β/2 = 10 times that of four,
# and the loss follows it.
GAP = 2 * 4 * 2.0**-24
MARGIN = 10 * 4 * 4 * 2.0**-24
ROUNDING = {"margin": MARGIN, "max_abs_margin": MARGIN, "loss": MARGIN}


@pytest.fixture(scope="module")
def one_device(make_training):
    return make_training().run(STEPS)


@pytest.fixture(scope="module")
def one_device_32(make_training):
    return make_training(pairs=32).run(STEPS)


def assert_same(history, one_device) -> None:
    for name in ("loss", "dpo_loss", "gradient_norm"):
        np.testing.assert_allclose([h[name] for h in history], [h[name] for h in one_device[0]], rtol=1e-5)


def test_the_first_loss_is_ln_2(one_device):
    first = one_device[0][0]
    assert abs(first["loss"] - math.log(2)) <= 1e-5
    assert first["max_abs_margin"] <= 1e-3


def test_the_loss_falls(one_device):
    history = one_device[0]
    assert history[-1]["loss"] < history[0]["loss"] - 0.01
    assert history[-1]["winner_gap"] < 0  # the SFT term: the winner's error is below the base model's


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulate", "frozen"),
    [(4, 2, 1, "split"), (1, 2, 4, "replicated"), pytest.param(1, 2, 4, "split", marks=pytest.mark.slow)],
)
def test_losses_depend_on_neither_mesh_nor_parts(make_training, one_device, data, fsdp, accumulate, frozen):
    history, _ = make_training(data, fsdp, accumulate=accumulate, frozen_sharding=frozen).run(STEPS)
    assert_same(history, one_device)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["split", "replicated"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_table_of_meshes(make_training, one_device_32, data, fsdp, accumulate, frozen):
    history, _ = make_training(data, fsdp, accumulate=accumulate, frozen_sharding=frozen, pairs=32).run(STEPS)
    assert_same(history, one_device_32)
    difference = max(abs(ours["loss"] / one["loss"] - 1) for ours, one in zip(history, one_device_32[0], strict=True))
    print(f"\n{data}x{fsdp}, {accumulate} parts: the {STEPS} losses differ by {difference:.1e} at most")


def mean_in_any_order(x):
    """The mean over the latent, right to float32's last bit.

    A plain sum of its 256 squares is off by up to 9 units in the last place, by chance: XLA picks its order by the size
    of the batch, so parts and whole differ. Multiples of 2⁻¹² add up exactly as long as the sum is below 2¹², and the
    remainders are too small to matter. The gradient is that of the plain mean: it goes through the remainders.
    """
    coarse = jnp.round(x * 4096.0) / 4096.0
    return (coarse.sum((1, 2, 3)) + (x - coarse).sum((1, 2, 3))) / x[0].size


def test_parts_have_the_gradient_of_the_whole_batch(make_training, monkeypatch):
    monkeypatch.setattr(losses, "mean_over_latent", mean_in_any_order)

    def gradient(accumulate):  # which plain descent at rate 1 subtracts
        training = make_training(optimizer=optax.sgd(1.0), trained=True, accumulate=accumulate)
        before = jax.device_get(training.state.params)
        (metrics,), state = training.run(1)
        return metrics, {name: before[name] - np.asarray(value) for name, value in state.params.items()}

    (whole_metrics, whole), (metrics, parts) = gradient(1), gradient(4)
    for name, wanted in whole.items():
        assert np.abs(wanted).max() > 0, name
        np.testing.assert_allclose(parts[name], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
    for name in ("loss", "margin", "max_abs_margin", "winner_gap", "loser_gap", "gradient_norm"):
        assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-5, abs=ROUNDING.get(name, GAP)), name
    assert metrics["accuracy"] == whole_metrics["accuracy"]


def test_the_state_is_given_away(make_training):
    training = make_training(ema=0.9)
    before = jax.tree.leaves(training.state)
    training.run(1)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(training.frozen))


def test_the_average_follows_the_adapter(make_training):
    """By hand from the parameters after each step: a ← 0.75·a + 0.25·p."""
    training = make_training(ema=0.75)
    state = training.state
    average = jax.device_get(state.params)
    for _ in range(3):
        state, _ = training.step(state, training.frozen, training.batch, training.key)
        average = {name: 0.75 * average[name] + 0.25 * np.asarray(value) for name, value in state.params.items()}
    assert state.exported is state.ema
    for name, value in average.items():
        np.testing.assert_allclose(state.ema[name], value, rtol=1e-5, atol=1e-7)
    assert any(np.abs(state.ema[name] - state.params[name]).max() > 1e-4 for name in average)


def test_pairs_that_cannot_be_divided_are_refused(make_training):
    with pytest.raises(PSAError, match="batch_size = 8 cannot be divided into accumulate = 4 parts on 4 devices"):
        make_training(2, 2, pairs=8, accumulate=4).run(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "most"}, "remat = 'most' is unknown"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"frozen_sharding": "x"}, "mesh.frozen"),
    ],
)
def test_options_that_do_not_exist_are_refused(make_training, options, message):
    with pytest.raises(PSAError, match=message):
        make_training(**options)
