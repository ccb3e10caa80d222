"""What is logged of a batch, on numbers worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.diffusion.predictions import PREDICTIONS
from psa_jax.preference import metrics

TIMES = jnp.asarray([0, 249, 250, 999, 600])
BANNED = jnp.asarray([True, False, True, False, True])
UNSAFE = jnp.asarray([True, True, False, False, True])
Z = jnp.asarray([2.0, -1.0, 0.0, 4.0, 0.5])


@pytest.fixture
def parts():
    return metrics.memberships(TIMES, 1000, BANNED, UNSAFE)


def test_a_tie_is_half_a_win():
    np.testing.assert_array_equal(metrics.wins(jnp.asarray([0.0, 3.0, -1e-9, 1e-9])), [0.5, 1.0, 0.0, 1.0])


def test_every_pair_is_in_one_part_of_the_schedule_and_one_of_the_prompts(parts):
    expected = {
        "t0": [1, 1, 0, 0, 0],
        "t1": [0, 0, 1, 0, 0],
        "t2": [0, 0, 0, 0, 1],
        "t3": [0, 0, 0, 1, 0],
        "banned": [1, 0, 0, 0, 1],
        "allowed": [0, 1, 0, 0, 0],
        "safe": [0, 0, 1, 1, 0],
        "banned0": [1, 0, 0, 0, 0],
        "banned1": [0, 0, 0, 0, 0],
        "banned2": [0, 0, 0, 0, 1],
        "banned3": [0, 0, 0, 0, 0],
    }
    assert parts.keys() == expected.keys() == {*metrics.PARTS, *metrics.SWAP_PARTS}
    for name, members in expected.items():
        np.testing.assert_array_equal(parts[name], np.array(members, bool), err_msg=name)


def test_sums_and_means(parts):
    row = {k: float(v) for k, v in metrics.part_sums({"margin": Z, "accuracy": metrics.wins(Z)}, parts).items()}
    assert row["pairs_t0"] == 2.0 and row["sum_margin_t0"] == 1.0 and row["sum_accuracy_t0"] == 1.0
    assert row["pairs_banned"] == 2.0 and row["sum_margin_banned"] == 2.5 and row["sum_accuracy_banned"] == 2.0
    means = metrics.part_means(row | {"loss": 0.7})
    assert means["loss"] == 0.7
    assert means["margin_t0"] == 0.5 and means["accuracy_t0"] == 0.5 and means["margin_safe"] == 2.0
    assert means["accuracy_safe"] == 0.75 and means["pairs_t0"] == 2.0
    assert not any(name.startswith("sum_") for name in means)


def test_sums_of_two_batches_give_the_mean_over_all_their_pairs(parts):
    """And a part that one batch lacks does no harm; one that both lack is left out."""
    first = metrics.part_sums({"margin": Z}, parts)
    late = {name: part & False for name, part in parts.items()} | {"t3": jnp.ones(5, bool), "safe": jnp.ones(5, bool)}
    second = metrics.part_sums({"margin": Z}, late)
    both = metrics.part_means({name: float(first[name] + second[name]) for name in first})
    assert both["margin_t3"] == pytest.approx((4.0 + 5.5) / 6)
    assert both["margin_t0"] == 0.5
    alone = metrics.part_means({name: float(value) for name, value in second.items()})
    assert "margin_t0" not in alone and alone["pairs_t0"] == 0.0
    assert alone["margin_safe"] == pytest.approx(1.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_colour_drift_is_that_of_the_clean_pictures(prediction):
    """x̂_0 of both models worked out in full, from x_t = √ᾱ·x_0 + √(1 − ᾱ)·ε and v = √ᾱ·ε − √(1 − ᾱ)·x_0."""
    random = np.random.default_rng(0)
    noisy, policy, reference = random.normal(size=(3, 2, 4, 4, 3))
    alpha = np.array([0.9, 0.2])
    signal, sigma = (x[:, None, None, None] for x in (np.sqrt(alpha), np.sqrt(1 - alpha)))

    def clean(predicted):
        return {
            "epsilon": (noisy - sigma * predicted) / signal,
            "v_prediction": signal * noisy - sigma * predicted,
            "sample": predicted,
        }[prediction]

    expected = np.abs((clean(policy) - clean(reference)).mean(axis=(1, 2))).mean(axis=-1)
    slope = PREDICTIONS[prediction].clean_slope(jnp.asarray(alpha, jnp.float32))
    drift = metrics.colour_drift(jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32), slope)
    np.testing.assert_allclose(drift, expected, rtol=1e-5)
