"""The edit of SDXL's pooled text in the loss: the policy has it before the first cross-attention, the reference not."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx
from support.torch_adapters import (
    as_jax,
    edited_pooled,
    file_tensors,
    gates_of_prompts,
    prompt_states,
    random_adapter,
    untrained_adapter,
    user_tokens,
)
from support.torch_models import FAST_COMPILE, UNETS, randomise, tensor, to_flax
from support.torch_pairs import FACTOR, KEY, PAIRS, PROMPTS, USER_DIM, VAE, torch_pairs

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import AddedConditions, UNet
from psa_jax.preference.draws import draw
from psa_jax.preference.metrics import part_means
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import FrozenModel, compute_reference_errors, pair_losses, summarise, swap_distances

MILD = Objective(beta=50.0, sft_weight=5.0)
SWAP = Objective(loss="none", sft_weight=0.0, swap_weight=3.0)
DISTANCE = jnp.asarray([0.1, 0.2, 0.4, 0.8])
WIDTH, P = 32, 16
SIZES = {"attention": {"tokens": 2}, "categories": {"tokens": 0, "gate": "categories"}}


@pytest.fixture(scope="module")
def xl(small_pipeline, tmp_path_factory):
    """(torch pipeline with a UNet that takes pooled text, the UNet in JAX, schedule, batch with cached text)."""
    theirs, model = copy.copy(small_pipeline[0]), small_pipeline[1]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": P + 6 * 6,
    }
    # With one channel a group, norms would take away what the timestep embedding adds.
    sizes = UNETS["mid_only"] | added | {"cross_attention_dim": WIDTH, "norm_num_groups": 4}
    theirs.unet = randomise(UNet2DConditionModel(**sizes), seed=5)
    config = UNetConfig.from_json(dict(theirs.unet.config))
    unet = to_flax(lambda r: UNet(config, rngs=r), theirs.unet, tmp_path_factory.mktemp("pooled_unet"))
    moments = torch.cat([tensor(2 * PAIRS, 4, 4, 4), torch.full((2 * PAIRS, 4, 4, 4), -1.0)], dim=-1)
    text, pooled = tensor(2 * PAIRS + 1, 7, WIDTH, seed=7), tensor(2 * PAIRS + 1, P, seed=8)
    batch = {
        "chosen": as_jax(3 * moments[:PAIRS]),
        "rejected": as_jax(3 * moments[PAIRS:]),
        "text_states": as_jax(text[:PAIRS]),
        "text_pooled": as_jax(pooled[:PAIRS]),
        "safe_text_states": as_jax(text[PAIRS:-1]),
        "safe_text_pooled": as_jax(pooled[PAIRS:-1]),
        "empty_states": as_jax(text[-1]),
        "empty_pooled": as_jax(pooled[-1]),
        "original_size": jnp.asarray([[32, 40], [64, 32], [32, 32]], jnp.int32),
        "crop": jnp.asarray([[0, 4], [16, 0], [0, 0]], jnp.int32),
        "twin": jnp.ones(PAIRS, bool),
        "user": as_jax(tensor(PAIRS, USER_DIM, seed=1)),
        **PROMPTS,
    }
    return theirs, unet, NoiseSchedule.from_config(model.scheduler_config), batch


def configure(xl, gate: str, pooled: bool = True) -> AdapterConfig:
    return AdapterConfig.for_unet(xl[1].config, user_dim=USER_DIM, kind="edit", pooled=pooled, **SIZES[gate])


def mean_loss(objective, adapter, unet, schedule, batch, compare=False):
    draws = draw(objective, schedule, batch, KEY)
    model = FrozenModel(unet, (), schedule, VAE)
    found = pair_losses(objective, adapter, model, batch, draws, None, DISTANCE, compare=compare)
    return jnp.mean(found.values["loss"]), summarise(found)


evaluate = jax.jit(mean_loss, static_argnums=(0, 5), compiler_options=FAST_COMPILE)


def loss_of(xl, objective, adapter, compare=False, **change):
    _, unet, schedule, batch = xl
    loss, metrics = evaluate(objective, adapter, unet, schedule, batch | change, compare)
    return float(loss), part_means({name: float(value) for name, value in metrics.items()})


def in_torch(xl, text, pooled):
    """Predictions of the base model for winners and losers with these conditions."""
    theirs, unet, schedule, batch = xl
    target = np.full((PAIRS, 2), 8 * 4)
    ids = np.concatenate([batch["original_size"], batch["crop"], target], axis=1).astype(np.float32)
    added = {"text_embeds": pooled, "time_ids": torch.from_numpy(ids)}
    nobody = untrained_adapter(AdapterConfig.for_unet(unet.config, user_dim=USER_DIM, kind="text", tokens=1))
    return torch_pairs(theirs, schedule, batch, nobody, FACTOR, encoder_hidden_states=text, added_cond_kwargs=added)


@pytest.fixture(scope="module")
def expected(xl):
    """Adapter with the attention's gate, and what torch predicts with and without it."""
    batch = {name: torch.from_numpy(np.array(array)) for name, array in xl[3].items()}
    adapter = random_adapter(configure(xl, "attention"))
    w, users, text, pooled = file_tensors(adapter), batch["user"], batch["text_states"], batch["text_pooled"]
    states = prompt_states(w, text, user_tokens(w, users, WIDTH), torch.ones(PAIRS, 1, 1), 8)
    edited = edited_pooled(w, pooled, gates_of_prompts(w, text, users, 8), torch.ones(PAIRS))
    base, policy = in_torch(xl, text, pooled), in_torch(xl, states, edited)
    without = in_torch(xl, states, pooled)
    assert (policy.reference[0] - without.reference[0]).abs().max() > 0.01  # the pooled text matters
    return adapter, base._replace(policy=policy.reference), batch


def test_loss_as_in_torch(xl, expected):
    adapter, pairs, _ = expected
    pw, pl, rw, rl = (error.numpy() for error in pairs.errors())
    z = 25.0 * ((pl - rl) - (pw - rw))
    loss, metrics = loss_of(xl, MILD, adapter)
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-z)) + 5.0 * (pw - rw)), rel=1e-4)
    assert metrics["margin"] == pytest.approx(z.mean(), rel=1e-3, abs=1e-4)
    assert metrics["winner_gap"] == pytest.approx((pw - rw).mean(), rel=1e-3, abs=1e-5)

    # Stored errors of the reference know nothing of the adapter, and stand in for it.
    _, unet, schedule, batch = xl
    model, draws = FrozenModel(unet, (), schedule, VAE), draw(MILD, schedule, batch, KEY)
    stored = compute_reference_errors(model, batch, draws)
    np.testing.assert_allclose(stored, np.stack([rw, rl], axis=1), rtol=1e-4)
    again = pair_losses(MILD, adapter, model, batch, draws, stored)
    assert float(jnp.mean(again.values["loss"])) == pytest.approx(loss, rel=1e-5)


def test_swap_as_in_torch(xl, expected):
    """Its target has the safe prompt's pooled text, which the adapter does not touch."""
    adapter, pairs, batch = expected
    text, pooled = batch["text_states"].clone(), batch["text_pooled"].clone()
    text[0], pooled[0] = batch["safe_text_states"][0], batch["safe_text_pooled"][0]  # the one that is banned
    target = in_torch(xl, text, pooled).reference[0]
    error = ((pairs.policy[0] - target) ** 2).mean(dim=(1, 2, 3)).numpy()
    loss, metrics = loss_of(xl, SWAP, adapter)
    assert loss == pytest.approx(3.0 * float(np.mean(error)) / float(np.mean(DISTANCE)), rel=1e-4)
    share = 1.0 - error / np.asarray(DISTANCE)[pairs.timesteps.numpy() // 250]
    for name, value in zip(("banned", "allowed", "safe"), share, strict=True):
        assert metrics[f"swap_learnt_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4)
    _, held_out = loss_of(xl, SWAP, adapter, compare=True)
    _, preferred = loss_of(xl, MILD, adapter)
    for name in ("accuracy", "margin", "winner_gap", "loser_gap"):
        scale = SWAP.beta / MILD.beta if name == "margin" else 1.0
        assert held_out[name] == pytest.approx(scale * preferred[name], rel=1e-3)


@pytest.mark.parametrize("gate", SIZES)
def test_an_untrained_adapter_has_learnt_nothing_and_broken_nothing(xl, gate):
    _, unet, schedule, batch = xl
    adapter = untrained_adapter(configure(xl, gate))
    loss, metrics = loss_of(xl, Objective(), adapter)
    assert abs(loss - math.log(2.0)) <= 1e-6
    assert metrics["max_abs_margin"] == metrics["winner_gap"] == metrics["colour_drift"] == 0.0
    _, metrics = loss_of(xl, SWAP, adapter)
    assert metrics["swap_learnt_allowed"] == metrics["swap_learnt_safe"] == 1.0
    draws = draw(SWAP, schedule, batch, KEY)
    distance = swap_distances(FrozenModel(unet, (), schedule, VAE), batch, draws)
    quarter = int(draws.timesteps[0]) // 250
    assert metrics["swap_learnt_banned"] == pytest.approx(
        1 - float(distance[0] / DISTANCE[quarter]), rel=1e-3, abs=1e-4
    )


def test_dropped_users_and_prompts(xl):
    adapter, batch = random_adapter(configure(xl, "categories")), xl[3]
    dropped = loss_of(xl, Objective(50.0, 5.0, user_dropout=1.0), adapter)[0]
    assert dropped == pytest.approx(loss_of(xl, MILD, adapter, user=jnp.zeros((PAIRS, USER_DIM)))[0], rel=1e-5)
    dropped = loss_of(xl, Objective(50.0, 5.0, text_dropout=1.0), adapter)[0]
    empty = {
        "text_states": jnp.tile(batch["empty_states"][None], (PAIRS, 1, 1)),
        "text_pooled": jnp.tile(batch["empty_pooled"][None], (PAIRS, 1)),
    }
    assert dropped == pytest.approx(loss_of(xl, MILD, adapter, **empty)[0], rel=1e-5)


@pytest.mark.parametrize("gate", SIZES)
def test_gradient(xl, gate):
    _, unet, schedule, batch = xl
    config = configure(xl, gate)
    graph, frozen = nnx.split(unet)

    def loss(arrays, frozen):
        return mean_loss(MILD, with_arrays(config, arrays), nnx.merge(graph, frozen), schedule, batch)[0]

    value_and_slopes = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
    arrays = adapter_arrays(random_adapter(config))
    _, slopes = value_and_slopes(arrays, frozen)
    for name, slope in slopes.items():
        assert np.isfinite(slope).all()
        assert (np.abs(slope).max() > 0) == ("_gate." not in name), name  # fitted before, and left alone
    for name in ("prompt_adapter.pooled_out.weight", "prompt_adapter.pooled_hidden.weight"):
        at = np.unravel_index(np.abs(slopes[name]).argmax(), slopes[name].shape)
        h = 2e-2
        above, below = (
            float(value_and_slopes(arrays | {name: arrays[name].at[at].add(step)}, frozen)[0]) for step in (h, -h)
        )
        assert (above - below) / (2 * h) == pytest.approx(float(slopes[name][at]), rel=0.05), name

    # Untrained: only what is zero moves, since it silences the rest.
    _, slopes = value_and_slopes(adapter_arrays(untrained_adapter(config)), frozen)
    for name, slope in slopes.items():
        assert (np.abs(slope).max() > 0) == ("_out." in name), name


def test_without_the_edit_the_pooled_text_is_shared(xl):
    """As many convolutions are traced as before: one prefix for both. With it, one more."""
    _, unet, schedule, batch = xl

    def convolutions(pooled: bool) -> int:
        adapter = random_adapter(configure(xl, "categories", pooled))
        traced = jax.make_jaxpr(lambda batch: mean_loss(MILD, adapter, unet, schedule, batch)[0])(batch)
        return str(traced).count("conv_general_dilated[")

    prefix = str(
        jax.make_jaxpr(
            lambda x: unet.run_prefix(x, jnp.zeros(1), AddedConditions(jnp.zeros((1, P)), jnp.zeros((1, 6))))
        )(jnp.zeros((1, 4, 4, 4)))
    ).count("conv_general_dilated[")
    assert convolutions(True) - convolutions(False) == prefix > 0
