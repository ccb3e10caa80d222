"""Swap distillation: as torch computes it, what it learns from, and what it logs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_adapters import random_adapter, untrained_adapter
from support.torch_models import FAST_COMPILE
from support.torch_pairs import FACTOR, KEY, PAIRS, USER_DIM, VAE, text_states, torch_pairs

from psa_jax.errors import PSAError
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference.draws import draw
from psa_jax.preference.metrics import part_means
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import FrozenModel, pair_losses, summarise, swap_distances

ALONE = Objective(loss="none", sft_weight=0.0, swap_weight=3.0)
BESIDE = Objective(beta=50.0, sft_weight=5.0, swap_weight=3.0)
DISTANCE = jnp.asarray([0.1, 0.2, 0.4, 0.8])  # of the parts of the schedule; all are drawn from


def swapped_loss(objective, adapter, unet, text_encoders, schedule, batch, compare=False):
    draws = draw(objective, schedule, batch, KEY)
    model = FrozenModel(unet, text_encoders, schedule, VAE)
    found = pair_losses(objective, adapter, model, batch, draws, None, DISTANCE, compare=compare)
    return jnp.mean(found.values["loss"]), summarise(found)


evaluate = jax.jit(swapped_loss, static_argnums=(0, 6), compiler_options=FAST_COMPILE)


def of(world, objective, adapter, compare=False, **change):
    _, unet, text_encoder, schedule, batch = world
    loss, metrics = evaluate(objective, adapter, unet, (text_encoder,), schedule, batch | change, compare)
    return float(loss), part_means({name: float(value) for name, value in metrics.items()})


def config(world, kind="text"):
    return AdapterConfig.for_unet(world[1].config, user_dim=USER_DIM, kind=kind, tokens=2)


@pytest.fixture(scope="module")
def expected(world):
    """For each pair, torch's mean of (policy on its prompt − base model on the prompt of the target)²."""
    theirs, _, _, schedule, batch = world
    adapter = random_adapter(config(world))
    prompts = {"encoder_hidden_states": text_states(theirs, batch)}
    policy = torch_pairs(theirs, schedule, batch, adapter, FACTOR, **prompts).policy[0]
    # Only the first prompt is unsafe and banned.
    target = text_states(theirs, batch)
    target[0] = text_states(theirs, batch, "safe_input_ids")[0]
    pairs = torch_pairs(theirs, schedule, batch, adapter, FACTOR, encoder_hidden_states=target)
    error = ((policy - pairs.reference[0]) ** 2).mean(dim=(1, 2, 3))
    return adapter, error.numpy(), pairs.timesteps.numpy() // 250


def test_loss_and_share_as_in_torch(world, expected):
    adapter, error, quarter = expected
    loss, metrics = of(world, ALONE, adapter)
    assert loss == pytest.approx(3.0 * float(np.mean(error)) / float(np.mean(DISTANCE)), rel=1e-4)
    share = 1.0 - error / np.asarray(DISTANCE)[quarter]
    for name, value in zip(("banned", "allowed", "safe"), share, strict=True):
        assert metrics[f"swap_learnt_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert metrics[f"swap_learnt_banned{quarter[0]}"] == pytest.approx(share[0], rel=1e-3, abs=1e-4)
    assert not {"accuracy", "margin", "dpo_loss", "winner_gap", "colour_drift"} & metrics.keys()


def test_beside_a_preference_loss_both_add_up(world, expected):
    adapter, error, _ = expected
    preferred, metrics = of(world, dataclasses.replace(BESIDE, swap_weight=0.0), adapter)
    loss, both = of(world, BESIDE, adapter)
    assert loss == pytest.approx(preferred + 3.0 * float(np.mean(error)) / float(np.mean(DISTANCE)), rel=1e-4)
    assert {name: both[name] for name in metrics if name != "loss"} == pytest.approx(
        {name: value for name, value in metrics.items() if name != "loss"}, rel=1e-5
    )


def test_held_out_measures_look_at_both_pictures_all_the_same(world, expected):
    adapter, *_ = expected
    _, alone = of(world, ALONE, adapter, compare=True)
    _, pairs = of(world, Objective(beta=ALONE.beta, sft_weight=0.0), adapter)
    for name in ("accuracy", "margin", "winner_gap", "loser_gap"):
        assert alone[name] == pytest.approx(pairs[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["published", "rewrite", "edit"])
def test_an_untrained_adapter_has_learnt_nothing_and_broken_nothing(world, kind):
    """What is left of a banned prompt is the whole distance, which torch gives, and of the others exactly nothing."""
    theirs, unet, text_encoder, schedule, batch = world
    adapter = untrained_adapter(config(world, kind))
    _, metrics = of(world, ALONE, adapter)
    assert metrics["swap_learnt_allowed"] == metrics["swap_learnt_safe"] == 1.0
    draws = draw(ALONE, schedule, batch, KEY)
    distance = swap_distances(FrozenModel(unet, (text_encoder,), schedule, VAE), batch, draws)
    policy = untrained_adapter(
        config(world)
    )  # of a kind that torch has inside the UNet; only the base model is looked at
    two = [
        torch_pairs(theirs, schedule, batch, policy, FACTOR, encoder_hidden_states=text_states(theirs, batch, name))
        for name in ("input_ids", "safe_input_ids")
    ]
    wanted = ((two[0].reference[0] - two[1].reference[0]) ** 2).mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(distance[:2], wanted[:2], rtol=1e-3)
    quarter = int(draws.timesteps[0]) // 250
    assert metrics["swap_learnt_banned"] == pytest.approx(1.0 - wanted[0] / float(DISTANCE[quarter]), rel=1e-3)


def test_prompts_are_swapped_for_banned_unsafe_ones_with_a_twin_only(world, expected):
    adapter, *_ = expected
    _, as_it_is = of(world, ALONE, adapter)
    other = world[4]["safe_input_ids"][::-1]
    _, changed = of(world, ALONE, adapter, safe_input_ids=other)
    assert changed["swap_learnt_banned"] != as_it_is["swap_learnt_banned"]
    for name in ("swap_learnt_allowed", "swap_learnt_safe"):
        assert changed[name] == as_it_is[name]
    # Without its twin a banned prompt teaches nothing, whatever stands in the column; the others need none.
    lacking = [
        of(world, ALONE, adapter, safe_input_ids=ids, twin=jnp.zeros(PAIRS, bool)) for ids in (other, other[::-1])
    ]
    assert lacking[0] == lacking[1]
    assert lacking[0][1]["swap_learnt_banned"] == 0.0
    assert lacking[0][1]["swap_learnt_safe"] == as_it_is["swap_learnt_safe"]


def test_a_dropped_user_bans_nothing(world, expected):
    adapter, *_ = expected
    dropped = dataclasses.replace(ALONE, user_dropout=1.0)
    assert of(world, dropped, adapter) == of(world, dropped, adapter, safe_input_ids=world[4]["safe_input_ids"][::-1])


def test_the_distance_is_that_of_the_timesteps_which_are_drawn(world, expected):
    """From the second half of the schedule alone: (0.4 + 0.8)/2."""
    adapter, *_ = expected
    half = dataclasses.replace(ALONE, timestep_low=0.5)
    loss, metrics = of(world, half, adapter)
    parts = [metrics[f"swap_learnt_{name}"] for name in ("banned", "allowed", "safe")]
    _, unet, text_encoder, schedule, batch = world
    quarter = np.asarray(draw(half, schedule, batch, KEY).timesteps) // 250
    errors = (1.0 - np.asarray(parts)) * np.asarray(DISTANCE)[quarter]
    assert loss == pytest.approx(3.0 * float(errors.mean()) / 0.6, rel=1e-3)


def test_alone_it_runs_one_picture_of_a_pair(world):
    """Two forwards of b rows: policy and target. Beside a preference loss 2b, 2b and b."""
    _, unet, text_encoder, schedule, batch = world
    adapter = random_adapter(config(world))

    def rows(objective):
        jaxpr = jax.make_jaxpr(
            lambda batch: swapped_loss(objective, adapter, unet, (text_encoder,), schedule, batch)[0]
        )
        text = str(jaxpr(batch))
        return text.count(f"f32[{2 * PAIRS},4,4,"), text.count(f"f32[{PAIRS},4,4,")

    assert rows(ALONE)[0] == 0
    assert rows(BESIDE)[0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "none"}, "needs swap distillation; give objective.swap_weight"),
        ({"loss": "none", "swap_weight": 1.0, "sft_weight": 1.0}, "sft_weight is 1.0; give 0 where"),
        ({"swap_weight": -1.0}, "swap_weight is -1.0; give 0 or a positive number"),
    ],
)
def test_bad_objectives(change, message):
    with pytest.raises(PSAError, match=message):
        Objective(**{"sft_weight": 0.0} | change)
