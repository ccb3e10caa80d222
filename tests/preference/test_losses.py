"""Preference losses on numbers worked by hand: values, slopes in closed form, limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from psa_jax.preference import losses
from psa_jax.preference.losses import LOSSES
from psa_jax.preference.objective import Objective

# Two pairs: the policy betters the winner by .002 and worsens the loser by .001; then the other way round.
PW, RW = jnp.asarray([0.010, 0.014]), jnp.asarray([0.012, 0.012])
PL, RL = jnp.asarray([0.021, 0.019]), jnp.asarray([0.020, 0.020])
BETA = 1000.0  # g_w = 500·(.002, −.002) = (1, −1), g_l = 500·(−.001, .001) = (−.5, .5), z = (1.5, −1.5)
Z = np.array([1.5, -1.5])


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def at_margin(name: str, z, **parameters):
    """A loss of the margin alone, at z: pl = z, the rest 0, β = 2."""
    z = jnp.asarray(z, jnp.float32)
    zero = jnp.zeros_like(z)
    return LOSSES[name].function(zero, z, zero, zero, beta=2.0, **parameters)


def slope_at_margin(name: str, z, **parameters):
    return jax.grad(lambda z: at_margin(name, z, **parameters).sum())(jnp.asarray(z, jnp.float32))


def test_margin():
    # (β/2)·(b − a): 500·(.001 + .002) = 1.5, and 500·(−.001 − .002) = −1.5.
    np.testing.assert_allclose(losses.margin(PW, PL, RW, RL, 1000.0), [1.5, -1.5], rtol=1e-5)
    np.testing.assert_allclose(losses.margin(PW, PL, RW, RL, 5000.0), [7.5, -7.5], rtol=1e-5)


def test_margin_does_not_care_for_what_both_models_find_hard():
    harder = losses.margin(PW + 0.5, PL, RW + 0.5, RL, 1000.0)
    np.testing.assert_allclose(harder, [1.5, -1.5], atol=1e-3)


# --- the family: values by hand


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        # log(1 + e^∓1.5) = .2014133, 1.7014133: the second is the first + 1.5.
        ("sigmoid", {}, [0.2014133, 1.7014133]),
        # .9·.2014133 + .1·1.7014133 = .3514133;  .9·1.7014133 + .1·.2014133 = 1.5514133.
        ("cdpo", {"label_smoothing": 0.1}, [0.3514133, 1.5514133]),
        # (.9·.2014133 − .1·1.7014133)/.8 = .0139133;  (.9·1.7014133 − .1·.2014133)/.8 = 1.8889133.
        ("robust", {"label_smoothing": 0.1}, [0.0139133, 1.8889133]),
        ("ipo", {}, [1.0, 4.0]),  # (1.5 − .5)², (−1.5 − .5)²
        ("hinge", {}, [0.0, 2.5]),  # max(0, 1 − 1.5), 1 + 1.5
        # All g: 1, −1, −.5, .5: mean 0, so q = 0. σ(−1) = .2689414, σ(−.5) = .3775407: ½·(.2689414 + .3775407);
        # and σ(1) = .7310586, σ(.5) = .6224593.
        ("kto", {}, [0.3232411, 0.6767590]),
        # p = σ(1.5) = .8175745: p·(−.2014133 + log 2) + (1 − p)·(−1.7014133 + log 2) with ε = ½ for a moment:
        # = log 2 − H(p), H(p) = .8175745·.2014133 + .1824255·1.7014133 = .4750518; then for ε = .1 the cross part
        # −p·log .9 − (1 − p)·log .1 = .0861399 + .4200503 = .5061902 takes the place of log 2: .0311384.
        # With p = .1824255: −.1824255·log .9 − .8175745·log .1 − H = .0192205 + 1.8825348 − .4750518 = 1.4267035.
        ("dmpo", {"label_smoothing": 0.1}, [0.0311384, 1.4267035]),
    ],
)
def test_values(name, parameters, expected):
    value = LOSSES[name].function(PW, PL, RW, RL, beta=BETA, **parameters)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)


def test_mapo():
    # δ = 1, β = 2: φ(x) = x/(eˣ − 1). φ(log 2) = log 2/1 = .6931472, φ(log 3) = log 3/2 = .5493061.
    # z = 2·(.6931472 − .5493061) = .2876821 = log(4/3), so −log σ(z) = log(1 + 3/4) = log(7/4).
    pw, pl = jnp.asarray([math.log(2.0)]), jnp.asarray([math.log(3.0)])
    np.testing.assert_allclose(losses.mapo(pw, pl, beta=2.0, odds_scale=1.0), [math.log(7 / 4)], rtol=1e-6)
    # The better of two pictures costs less than a tie, ln 2, and the worse more.
    swapped = losses.mapo(pl, pw, beta=2.0, odds_scale=1.0)
    np.testing.assert_allclose(swapped, [math.log(7 / 3)], rtol=1e-6)  # log(1 + 4/3)


def test_mapo_at_small_and_large_errors():
    # φ'(x) → −½ as x → 0, so for small δ it is −log σ((β/2)·(pl − pw)).
    flat = losses.mapo(PW, PL, beta=200.0, odds_scale=0.1)
    np.testing.assert_allclose(flat, np.log1p(np.exp(-100.0 * np.asarray(PL - PW))), rtol=2e-3)
    slope = jax.grad(lambda pw, pl: losses.mapo(pw, pl, beta=2.0, odds_scale=1.0).sum(), argnums=(0, 1))
    for error in (0.0, 1e-6, 1.0, 500.0):  # no NaN where eˣ overflows or eˣ − 1 is 0
        assert all(np.isfinite(part).all() for part in slope(jnp.asarray([error]), jnp.asarray([1.0])))


def test_kto_reference_point():
    # Both pictures better than the reference: g = 2 and 1, mean 1.5 = q. ½·(σ(1.5 − 2) + σ(1 − 1.5)) = σ(−.5).
    def loss(pw, pl):
        return losses.kto(pw, pl, jnp.asarray([2.0]), jnp.asarray([2.0]), beta=2.0)

    better = loss(jnp.asarray([0.0]), jnp.asarray([1.0]))
    np.testing.assert_allclose(better, [sigma(-0.5)], rtol=1e-6)
    # Both worse, g = −1 and −2: the mean is negative, so q = 0. ½·(σ(1) + σ(−2)).
    worse = loss(jnp.asarray([3.0]), jnp.asarray([4.0]))
    np.testing.assert_allclose(worse, [0.5 * (sigma(1.0) + sigma(-2.0))], rtol=1e-6)
    # q has no gradient: d/dg_w of ½·σ(q − g_w) alone is −½·σ'(−.5), and dg_w/dpw = −β/2 = −1.
    slope = jax.grad(lambda pw: loss(pw, jnp.asarray([1.0])).sum())(jnp.asarray([0.0]))
    np.testing.assert_allclose(slope, [0.5 * sigma(0.5) * sigma(-0.5)], rtol=1e-5)


def test_devices_share_the_reference_point_of_kto():
    """Four devices with a pair each, two of them better than the others: one q, that of all eight pictures."""
    pairs = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    errors = [jnp.asarray(e) for e in ([0.1, 0.2, 0.3, 0.9], [0.6, 0.1, 0.9, 0.9], [0.5] * 4, [0.6] * 4)]
    alone = losses.kto(*errors, beta=20.0)
    spread = jax.jit(lambda *errors: losses.kto(*errors, beta=20.0))(*jax.device_put(errors, pairs))
    np.testing.assert_allclose(spread, alone, rtol=1e-6)
    of_one = losses.kto(*(error[:1] for error in errors), beta=20.0)
    assert abs(float(of_one[0] - alone[0])) > 1e-2  # a pair by itself has another q


# --- slopes in z, in closed form

MARGINS = np.array([-3.0, -0.5, 0.0, 0.4, 0.5, 2.0])


@pytest.mark.parametrize(
    ("name", "parameters", "slope"),
    [
        ("sigmoid", {}, lambda z: -sigma(-z)),
        ("cdpo", {"label_smoothing": 0.2}, lambda z: sigma(z) - 0.8),
        ("robust", {"label_smoothing": 0.2}, lambda z: (-0.8 * sigma(-z) - 0.2 * sigma(z)) / 0.6),
        ("ipo", {}, lambda z: 2.0 * (z - 0.5)),
        ("hinge", {}, lambda z: -(z < 1.0).astype(float)),
        ("dmpo", {"label_smoothing": 0.2}, lambda z: sigma(z) * sigma(-z) * (z - math.log(4.0))),
    ],
)
def test_slopes(name, parameters, slope):
    np.testing.assert_allclose(slope_at_margin(name, MARGINS, **parameters), slope(MARGINS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.function is not None])
def test_slopes_in_the_errors(name):
    """A margin rises by β/2 as pw falls or pl rises, so a better winner and a worse loser never cost more."""
    entry, objective = LOSSES[name], Objective(beta=BETA)
    parameters = {p: getattr(objective, p) for p in entry.parameters}
    rest = (RW, RL) if entry.reference else ()
    of_winner, of_loser = jax.grad(
        lambda pw, pl: entry.function(pw, pl, *rest, **parameters).sum(), argnums=(0, 1)
    )(PW, PL)  # fmt: skip
    assert np.isfinite(of_winner).all() and np.isfinite(of_loser).all()
    if name not in ("kto", "mapo"):  # of the margin alone
        np.testing.assert_allclose(of_winner, -np.asarray(of_loser), rtol=1e-5)
    if name not in ("ipo", "hinge"):  # their first pair has all the margin that they ask for
        assert (np.asarray(of_winner) > 0).all() and (np.asarray(of_loser) < 0).all()


# --- limits


def test_without_smoothing_cdpo_and_robust_are_the_sigmoid():
    for name in ("cdpo", "robust"):
        np.testing.assert_allclose(
            at_margin(name, MARGINS, label_smoothing=0.0), at_margin("sigmoid", MARGINS), rtol=1e-6
        )


def test_robust_is_unbiased():
    """With labels that are wrong with probability ε, its mean is the sigmoid loss of the true labels."""
    right, wrong = (at_margin("robust", s * MARGINS, label_smoothing=0.2) for s in (1.0, -1.0))
    np.testing.assert_allclose(0.8 * right + 0.2 * wrong, at_margin("sigmoid", MARGINS), rtol=1e-5, atol=1e-6)


def test_cdpo_and_dmpo_are_least_where_the_labels_noise_puts_the_margin():
    least = math.log(0.9 / 0.1)
    for name in ("cdpo", "dmpo"):
        np.testing.assert_allclose(slope_at_margin(name, [least], label_smoothing=0.1), [0.0], atol=1e-6)
    np.testing.assert_allclose(at_margin("dmpo", [least], label_smoothing=0.1), [0.0], atol=1e-6)


def test_large_margins_are_finite():
    z = [200.0, -200.0]
    np.testing.assert_allclose(at_margin("sigmoid", z), [0.0, 200.0], rtol=1e-6)
    np.testing.assert_allclose(slope_at_margin("sigmoid", z), [0.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(at_margin("dmpo", z, label_smoothing=0.1), [-math.log(0.9), -math.log(0.1)], rtol=1e-6)
    np.testing.assert_allclose(slope_at_margin("dmpo", z, label_smoothing=0.1), [0.0, 0.0], atol=1e-6)


def test_as_beta_vanishes_every_pair_teaches_as_much():
    """−log σ(z) = log 2 − z/2 + …: the slope in pw is β/4 for each pair, whatever its errors."""
    slope = jax.grad(lambda pw: losses.sigmoid(pw, PL, RW, RL, beta=1e-3).sum())(PW)
    np.testing.assert_allclose(slope, [2.5e-4, 2.5e-4], rtol=1e-5)


# --- modifiers


def test_sft():
    np.testing.assert_allclose(losses.sft(PW, RW), [-0.002, 0.002], rtol=1e-4)
    np.testing.assert_array_equal(losses.sft(PW, None), PW)


def test_dpop():
    # The second winner is .002 worse than the reference's: at λ = 3 it counts as .014 + .006, and z falls by
    # 500·.006 = 3 to −4.5. The first is better and stays.
    harder = losses.dpop(PW, RW, 3.0)
    np.testing.assert_allclose(harder, [0.010, 0.020], rtol=1e-6)
    np.testing.assert_allclose(losses.margin(harder, PL, RW, RL, BETA), [1.5, -4.5], rtol=1e-4)
    slope = jax.grad(lambda pw: losses.dpop(pw, RW, 3.0).sum())
    np.testing.assert_allclose(slope(PW), [1.0, 4.0])  # 1, and 1 + λ
    np.testing.assert_allclose(slope(RW), [1.0, 1.0])  # at the start


def test_sdpo():
    pw, pl = jnp.asarray([0.2, 0.2, 0.2, 0.2]), jnp.asarray([0.5, 0.5, 0.5, 0.5])
    # (1 − ¼)·.2 = .15: against c = .3 half of the slope is left, against c = .1 all of it (at most 1); where the two
    # do not oppose each other (c ≤ 0) all of it.
    cross = jnp.asarray([0.3, 0.1, 0.0, -0.3])
    np.testing.assert_array_equal(losses.sdpo(pw, pl, cross, 0.25), pl)
    slope = jax.grad(lambda pl: losses.sdpo(pw, pl, cross, 0.25).sum())(pl)
    np.testing.assert_allclose(slope, [0.5, 1.0, 1.0, 1.0], rtol=1e-6)
    slope = jax.grad(lambda pl: losses.sdpo(pw, pl, cross, 1.0).sum())(pl)
    np.testing.assert_allclose(slope, [0.0, 0.0, 1.0, 1.0])
    # λ has no gradient of its own.
    through = jax.grad(lambda pw, cross: losses.sdpo(pw, pl, cross, 0.25).sum(), argnums=(0, 1))(pw, cross)
    np.testing.assert_array_equal(through, np.zeros((2, 4)))


def test_sdpo_never_raises_the_winners_error():
    """One output w for both pictures (what the guarantee assumes): a step down the loss lowers (w − n_w)²."""
    targets_w, targets_l = jnp.asarray([0.0, 0.0]), jnp.asarray([0.9, -2.0])  # behind the winner's, and far across
    output = jnp.asarray([1.0, 1.0])

    def loss(output, guarded: bool):
        pw, pl = (output - targets_w) ** 2, (output - targets_l) ** 2
        cross = (output - targets_w) * (output - targets_l)
        if guarded:
            pl = losses.sdpo(pw, pl, cross, 0.0)
        return losses.sigmoid(pw, pl, jnp.ones(2), jnp.ones(2), beta=2.0).sum()

    plain, safe = (np.asarray(jax.grad(loss)(output, guarded)) for guarded in (False, True))
    assert plain[1] < 0  # a step down this slope would move the second output away from its winner's target
    assert safe[1] == pytest.approx(0.0, abs=1e-6)  # μ = 0: pushed as far as does no harm
    assert safe[0] == pytest.approx(plain[0])  # no need: the loser pushes less than the winner pulls


def test_reference_kl():
    # One pair of 1 × 2 latents of one channel: differences (1, 3) for the winner, (0, 2) for the loser.
    reference = jnp.zeros((2, 1, 2, 1))
    policy = jnp.asarray([1.0, 3.0, 0.0, 2.0]).reshape(2, 1, 2, 1)
    np.testing.assert_allclose(losses.reference_kl(policy, reference), [3.5])  # ½·((1 + 9)/2 + (0 + 4)/2)
    slope = jax.grad(lambda policy: losses.reference_kl(policy, reference).sum())(policy)
    np.testing.assert_allclose(slope, policy / 2)  # 2·difference/2 numbers·½


# --- weights


def test_timestep_weight():
    snr = jnp.asarray([20.0, 5.0, 1.0, 0.0])
    np.testing.assert_array_equal(losses.timestep_weight("none", snr, "v_prediction", 5.0), np.ones(4))
    np.testing.assert_array_equal(losses.timestep_weight("snr", snr, "epsilon", 5.0), np.ones(4))
    np.testing.assert_allclose(losses.timestep_weight("snr", snr, "v_prediction", 5.0), [20 / 21, 5 / 6, 1 / 2, 0])
    np.testing.assert_allclose(losses.timestep_weight("snr", snr, "sample", 5.0), [20, 5, 1, 0])
    # min(SNR, 5) over SNR, over SNR + 1, and as it is.
    np.testing.assert_allclose(losses.timestep_weight("min_snr", snr, "epsilon", 5.0), [0.25, 1, 1, 1])
    np.testing.assert_allclose(
        losses.timestep_weight("min_snr", snr, "v_prediction", 5.0), [5 / 21, 5 / 6, 1 / 2, 0], rtol=1e-6
    )
    np.testing.assert_allclose(losses.timestep_weight("min_snr", snr, "sample", 5.0), [5, 5, 1, 0])


def test_weighted_errors_do_not_depend_on_what_is_predicted():
    """The same x̂_0, told as ε or as v: once weighted, the errors are equal."""
    alpha = np.array([0.95, 0.5, 0.05])
    snr, error = alpha / (1 - alpha), np.array([0.3, 0.2, 0.1])
    told = {"epsilon": snr * error, "v_prediction": (snr + 1) * error, "sample": error}
    for kind in ("snr", "min_snr"):
        weighted = [
            losses.timestep_weight(kind, jnp.asarray(snr, jnp.float32), prediction, 2.0) * jnp.float32(e)
            for prediction, e in told.items()
        ]
        np.testing.assert_allclose(weighted[1], weighted[0], rtol=1e-5)
        np.testing.assert_allclose(weighted[2], weighted[0], rtol=1e-5)


def test_pair_weight():
    banned, unsafe = jnp.asarray([True, False, True, False]), jnp.asarray([True, True, False, False])
    weight = losses.pair_weight(banned, unsafe, of_banned=2.0, of_allowed=1.0, of_safe=0.5)
    np.testing.assert_array_equal(weight, [2.0, 1.0, 0.5, 0.5])  # a safe prompt is safe for everybody
