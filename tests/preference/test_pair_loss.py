"""Preference losses of a batch: what holds at initialisation, what is shared in a pair, and evaluations in torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from support.torch_adapters import as_jax, random_adapter, untrained_adapter
from support.torch_models import FAST_COMPILE, tensor
from support.torch_pairs import FACTOR, KEY, PAIRS, USER_DIM, VAE, TorchPairs, text_states, torch_pairs

from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig
from psa_jax.preference.draws import draw
from psa_jax.preference.losses import LOSSES
from psa_jax.preference.metrics import part_means
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import Errors, FrozenModel, compose, pair_losses, summarise

PAPER = Objective()
MILD = Objective(beta=50.0, sft_weight=5.0)  # float32 rounding of the errors stays far below the margin


def preference_loss(objective, adapter, unet, text_encoders, schedule, vae, batch, key):
    """Mean loss of a batch and what is logged, as the training step has them."""
    draws = draw(objective, schedule, batch, key)
    found = pair_losses(objective, adapter, FrozenModel(unet, text_encoders, schedule, vae), batch, draws)
    return jnp.mean(found.values["loss"]), summarise(found)


evaluate = jax.jit(preference_loss, static_argnums=(0, 5), compiler_options=FAST_COMPILE)


def configure(world, kind: str = "text", tokens: int = 2) -> AdapterConfig:
    return AdapterConfig.for_unet(world[1].config, user_dim=USER_DIM, kind=kind, tokens=tokens)


def loss_of(world, objective, adapter, key=KEY, **change):
    _, unet, text_encoder, schedule, batch = world
    return evaluate(objective, adapter, unet, (text_encoder,), schedule, VAE, batch | change, key)


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_an_untrained_adapter_starts_at_ln_2(world, kind):
    loss, metrics = loss_of(world, PAPER, untrained_adapter(configure(world, kind)))
    assert abs(float(loss) - math.log(2.0)) <= 1e-5
    assert abs(float(metrics["dpo_loss"]) - math.log(2.0)) <= 1e-5
    assert float(metrics["max_abs_margin"]) <= 1e-3
    assert abs(float(metrics["winner_gap"])) <= 1e-7


def test_swapping_winner_and_loser_turns_the_margin_around(world):
    """True only if both sides of a pair have the same noise and timestep."""
    batch = world[4]
    adapter = random_adapter(configure(world))
    # Without variance the latents are the means, whatever noise the VAE's sampling draws for each side.
    chosen, rejected = (batch[side].at[..., 4:].set(-30.0) for side in ("chosen", "rejected"))
    _, there = loss_of(world, MILD, adapter, chosen=chosen, rejected=rejected)
    _, back = loss_of(world, MILD, adapter, chosen=rejected, rejected=chosen)
    assert abs(float(there["margin"])) > 0.01
    assert float(back["margin"]) == pytest.approx(-float(there["margin"]), rel=1e-3)
    assert float(back["winner_gap"]) == pytest.approx(float(there["loser_gap"]), rel=1e-3)
    # And the same picture on both sides is a tie.
    _, same = loss_of(world, MILD, adapter, chosen=chosen, rejected=chosen)
    assert float(same["max_abs_margin"]) <= 1e-4


def test_keys_change_the_draw_and_repeat_it(world):
    adapter = random_adapter(configure(world))
    first, again, other = (float(loss_of(world, MILD, adapter, key)[0]) for key in (KEY, KEY, jax.random.key(4)))
    assert first == again
    assert abs(first - other) > 1e-4


def test_user_dropout_gives_the_user_of_zeros(world):
    adapter = random_adapter(configure(world))
    dropped = loss_of(world, Objective(50.0, 5.0, user_dropout=1.0), adapter)[0]
    zeros = loss_of(world, MILD, adapter, user=jnp.zeros((PAIRS, USER_DIM)))[0]
    kept = loss_of(world, MILD, adapter)[0]
    np.testing.assert_allclose(dropped, zeros, rtol=1e-5)
    assert abs(float(kept - zeros)) > 1e-3


def test_text_dropout_gives_the_empty_prompt(world):
    adapter, batch = random_adapter(configure(world)), world[4]
    dropped = loss_of(world, Objective(50.0, 5.0, text_dropout=1.0), adapter)[0]
    empty = loss_of(world, MILD, adapter, input_ids=jnp.tile(batch["empty_ids"][None], (PAIRS, 1)))[0]
    kept = loss_of(world, MILD, adapter)[0]
    np.testing.assert_allclose(dropped, empty, rtol=1e-5)
    assert abs(float(kept - empty)) > 1e-4


def assert_as_in_torch(loss, metrics, pairs: TorchPairs) -> None:
    """Everything logged, from the four errors of torch, at MILD."""
    pw, pl, rw, rl = (error.numpy() for error in pairs.errors())
    z = 25.0 * ((pl - rl) - (pw - rw))
    dpo = np.log1p(np.exp(-z))
    assert np.abs(z).max() > 0.05
    assert float(loss) == pytest.approx(np.mean(dpo + 5.0 * (pw - rw)), rel=1e-4)
    assert float(metrics["loss"]) == float(loss)
    assert float(metrics["dpo_loss"]) == pytest.approx(dpo.mean(), rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(z.mean(), rel=1e-3, abs=1e-4)
    assert float(metrics["max_abs_margin"]) == pytest.approx(np.abs(z).max(), rel=1e-3)
    assert float(metrics["winner_gap"]) == pytest.approx((pw - rw).mean(), rel=1e-3, abs=1e-5)
    assert float(metrics["loser_gap"]) == pytest.approx((pl - rl).mean(), rel=1e-3, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((z > 0).mean())

    means = part_means({name: float(value) for name, value in metrics.items()})
    for i, name in enumerate(("banned", "allowed", "safe")):  # one pair of each
        assert means[f"pairs_{name}"] == 1.0
        assert means[f"accuracy_{name}"] == float(z[i] > 0)
        assert means[f"margin_{name}"] == pytest.approx(z[i], rel=1e-3, abs=1e-4)
        assert means[f"winner_gap_{name}"] == pytest.approx((pw - rw)[i], rel=1e-3, abs=1e-5)
        assert means[f"loser_gap_{name}"] == pytest.approx((pl - rl)[i], rel=1e-3, abs=1e-5)
    quarters = pairs.timesteps.numpy() // 250
    for i in range(4):
        mine = quarters == i
        assert means[f"pairs_t{i}"] == mine.sum()
        if mine.any():
            assert means[f"margin_t{i}"] == pytest.approx(z[mine].mean(), rel=1e-3, abs=1e-4)
            assert means[f"winner_gap_t{i}"] == pytest.approx((pw - rw)[mine].mean(), rel=1e-3, abs=1e-5)
        else:
            assert f"margin_t{i}" not in means


@pytest.mark.parametrize(("kind", "tokens"), [("published", 1), ("text", 2)])
def test_loss_and_metrics_as_in_torch(world, kind, tokens):
    theirs, _, _, schedule, batch = world
    adapter = random_adapter(configure(world, kind, tokens))
    pairs = torch_pairs(theirs, schedule, batch, adapter, FACTOR, encoder_hidden_states=text_states(theirs, batch))
    loss, metrics = loss_of(world, MILD, adapter)
    assert_as_in_torch(loss, metrics, pairs)

    # x̂_0 = (x_t − √(1 − ᾱ)·ε̂)/√ᾱ of both models on the same x_t.
    alpha = torch.from_numpy(np.array(schedule.alphas_cumprod))[pairs.timesteps.long()]
    difference = (pairs.policy[0] - pairs.reference[0]).mean(dim=(2, 3))
    drift = (((1 - alpha) / alpha).sqrt()[:, None] * difference).abs().mean()
    assert float(metrics["colour_drift"]) == pytest.approx(float(drift), rel=1e-3)


COMPOSED = {
    "ipo": Objective(beta=50.0, sft_weight=0.0, loss="ipo"),
    "kto": Objective(beta=50.0, sft_weight=0.0, loss="kto"),
    "mapo": Objective(beta=50.0, sft_weight=3.0, loss="mapo"),
    "sdpo": Objective(beta=50.0, sft_weight=0.0, sdpo_mu=0.9),
    "reference_kl": Objective(beta=50.0, sft_weight=0.0, reference_kl_weight=4.0),
    "everything": Objective(
        beta=50.0,
        sft_weight=5.0,
        loss="dmpo",
        dpop_weight=2.0,
        sdpo_mu=0.5,
        reference_kl_weight=4.0,
        timestep_weight="min_snr",
        snr_gamma=0.5,
        banned_weight=2.0,
        allowed_weight=1.5,
        safe_weight=0.5,
    ),
}


def torch_composed(name: str, pairs: TorchPairs, schedule) -> torch.Tensor:
    """The objectives above from their formulas, one after the other, without the table."""
    pw, pl, rw, rl = pairs.errors()
    winner, loser = (x - pairs.noise for x in pairs.policy)
    cross = (winner * loser).mean(dim=(1, 2, 3)).double().detach()
    reference_kl = sum(
        ((p - r) ** 2).mean(dim=(1, 2, 3)).double() / 2 for p, r in zip(pairs.policy, pairs.reference, strict=True)
    )

    def guarded(mu):
        share = torch.where(cross > 0, ((1 - mu) * pw.detach() / cross).clamp(max=1.0), torch.ones(()).double())
        assert (share < 1).any()  # otherwise there is nothing to see
        return pl.detach() + share * (pl - pl.detach())

    if name == "ipo":
        return ((25.0 * ((pl - rl) - (pw - rw)) - 0.5) ** 2).mean()
    if name == "kto":
        g = 25.0 * torch.cat([rw - pw, rl - pl])
        likes = torch.cat([torch.ones(PAIRS), -torch.ones(PAIRS)])
        return (1 - torch.sigmoid(likes * (g - g.mean().clamp(min=0).detach()))).mean()
    if name == "mapo":
        odds_w, odds_l = (0.5 * e / (torch.exp(0.5 * e) - 1) for e in (pw, pl))
        return (3.0 * pw - F.logsigmoid(100.0 * (odds_w - odds_l))).mean()
    if name == "sdpo":
        return -F.logsigmoid(25.0 * ((guarded(0.9) - rl) - (pw - rw))).mean()
    if name == "reference_kl":
        return (4.0 * reference_kl - F.logsigmoid(25.0 * ((pl - rl) - (pw - rw)))).mean()
    alpha = torch.from_numpy(np.array(schedule.alphas_cumprod))[pairs.timesteps.long()].double()
    omega = (0.5 * (1 - alpha) / alpha).clamp(max=1.0)
    assert (omega < 1).any()
    z = 25.0 * omega * ((guarded(0.5) - rl) - (pw + 2.0 * (pw - rw).clamp(min=0) - rw))
    p = torch.sigmoid(z)
    dmpo = p * torch.log(p / 0.9) + (1 - p) * torch.log((1 - p) / 0.1)
    each = dmpo + omega * (5.0 * (pw - rw) + 4.0 * reference_kl)
    return (torch.tensor([2.0, 1.5, 0.5]) * each).mean()


def test_objectives_and_their_gradients_as_in_torch(world):
    """The gradient is that in the users' embeddings: it goes through both of a pair's images and all that is added."""
    theirs, unet, text_encoder, schedule, batch = world
    adapter = random_adapter(configure(world))

    def all_of_them(user):
        def loss(objective, user):
            arrays = batch | {"user": user}
            return preference_loss(objective, adapter, unet, (text_encoder,), schedule, VAE, arrays, KEY)[0]

        return {name: jax.value_and_grad(loss, argnums=1)(objective, user) for name, objective in COMPOSED.items()}

    ours = jax.jit(all_of_them, compiler_options=FAST_COMPILE)(batch["user"])
    with torch.enable_grad():
        user = torch.from_numpy(np.array(batch["user"])).requires_grad_()
        states = text_states(theirs, batch)
        pairs = torch_pairs(theirs, schedule, batch, adapter, FACTOR, user, encoder_hidden_states=states)
        for name, (loss, gradient) in ours.items():
            expected = torch_composed(name, pairs, schedule)
            assert float(loss) == pytest.approx(expected.item(), rel=1e-4), name
            (slope,) = torch.autograd.grad(expected, user, retain_graph=True)
            np.testing.assert_allclose(gradient, slope, atol=1e-3 * float(slope.abs().max()), err_msg=name)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.function is not None])
def test_every_loss_has_a_finite_value_and_gradient(name):
    """From predictions on; one pair is a tie, and the mean of errors without noise is far from any that occur."""
    policy = as_jax(tensor(2 * PAIRS, 4, 4, 4, seed=2)).at[:2].set(0.0)
    reference, target = as_jax(tensor(2 * PAIRS, 4, 4, 4, seed=3)), jnp.zeros((2 * PAIRS, 4, 4, 4))
    objective = Objective(loss=name, dpop_weight=1.0, sdpo_mu=0.5, reference_kl_weight=1.0)

    def loss(policy):
        return jnp.mean(compose(objective, Errors.from_predictions(policy, reference, target))[1])

    value, slope = jax.value_and_grad(loss)(policy)
    assert np.isfinite(value)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_a_loss_without_reference_does_not_run_it(world):
    """As many convolutions as one forward of the UNet has; and nothing is logged against the reference."""
    _, unet, text_encoder, schedule, batch = world
    adapter = random_adapter(configure(world))

    def convolutions(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")

    def trace(objective):
        def run(batch):
            return preference_loss(objective, adapter, unet, (text_encoder,), schedule, VAE, batch, KEY)[1]

        return convolutions(run, batch), jax.eval_shape(run, batch)

    one = convolutions(
        lambda x: unet(x, jnp.zeros(PAIRS), unet.context(jnp.zeros((PAIRS, 8, unet.config.cross_attention_dim)))),
        jnp.zeros((PAIRS, 4, 4, 4)),
    )
    alone, metrics = trace(Objective(loss="mapo"))
    assert alone == one > 0
    assert {"loss", "accuracy", "margin", "sum_margin_t0"} <= metrics.keys()
    assert not any("gap" in name or "drift" in name for name in metrics)
    added = ({"reference_kl_weight": 1.0}, {"dpop_weight": 1.0})
    for needs in (Objective(), *(Objective(loss="mapo", **weight) for weight in added)):
        assert needs.needs_reference
    count, metrics = trace(Objective(loss="mapo", reference_kl_weight=1.0))
    assert count > alone
    assert {"winner_gap", "loser_gap", "colour_drift"} <= metrics.keys()


def test_gradient(world):
    _, unet, text_encoder, schedule, batch = world
    config = configure(world)
    graph, frozen = nnx.split(unet)

    def loss(arrays, frozen):
        adapter, whole = with_arrays(config, arrays), nnx.merge(graph, frozen)
        return preference_loss(MILD, adapter, whole, (text_encoder,), schedule, VAE, batch, KEY)[0]

    value_and_slopes = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)

    # Trained: every parameter has a gradient, and it is the slope.
    arrays = adapter_arrays(random_adapter(config))
    _, slopes = value_and_slopes(arrays, frozen)
    for name, slope in slopes.items():
        assert np.isfinite(slope).all()
        assert np.abs(slope).max() > 0, name
    name = "psa_adapter.0.to_v_user.0.weight"
    at = np.unravel_index(np.abs(slopes[name]).argmax(), slopes[name].shape)
    h = 2e-2
    above, below = (
        float(value_and_slopes(arrays | {name: arrays[name].at[at].add(step)}, frozen)[0]) for step in (h, -h)
    )
    assert (above - below) / (2 * h) == pytest.approx(float(slopes[name][at]), rel=0.02)

    # Untrained: only the matrix that is zero moves, since it silences the rest.
    _, slopes = value_and_slopes(adapter_arrays(untrained_adapter(config)), frozen)
    for name, slope in slopes.items():
        assert (np.abs(slope).max() > 0) == ("to_v" in name), name
