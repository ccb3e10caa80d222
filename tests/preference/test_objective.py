"""Diffusion-DPO of a batch: what holds at initialisation, what is shared in a pair, and one evaluation in torch."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from flax import nnx
from torch_adapters import adapted_unet, as_jax, random_adapter, untrained_adapter
from torch_models import FAST_COMPILE, UNETS, randomise, tensor, to_flax

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.models.adapter import KINDS, AdapterConfig
from psa_jax.models.config import UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import latent_noise
from psa_jax.preference.objective import Objective, preference_loss, spread_timesteps

PAIRS, USER_DIM, FACTOR = 3, 6, 0.18215
VAE = VAEConfig(scaling_factor=FACTOR)
PAPER = Objective()
MILD = Objective(beta=50.0, sft_weight=5.0)  # float32 rounding of the errors stays far below the margin
KEY = jax.random.key(3)

evaluate = jax.jit(preference_loss, static_argnums=(0, 5), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def world(small_pipeline, tmp_path_factory):
    """(torch pipeline, UNet, text encoder, schedule, batch), the UNet of the smallest kind: it is compiled often."""
    theirs, model = copy.copy(small_pipeline[0]), small_pipeline[1]
    theirs.unet = randomise(UNet2DConditionModel(**UNETS["mid_only"] | {"cross_attention_dim": 32}), seed=5)
    config = UNetConfig.from_json(dict(theirs.unet.config))
    unet = to_flax(lambda r: UNet(config, rngs=r), theirs.unet, tmp_path_factory.mktemp("objective_unet"))
    moments = torch.cat([tensor(2 * PAIRS, 4, 4, 4), torch.full((2 * PAIRS, 4, 4, 4), -1.0)], dim=-1)
    ids = model.tokenize(["a cat", "cat at a cat", "t", ""])
    batch = {
        "chosen": as_jax(3 * moments[:PAIRS]),
        "rejected": as_jax(3 * moments[PAIRS:]),
        "input_ids": jnp.asarray(ids[:PAIRS]),
        "empty_ids": jnp.asarray(ids[PAIRS]),
        "user": as_jax(tensor(PAIRS, USER_DIM, seed=1)),
    }
    return theirs, unet, model.text_encoder, NoiseSchedule.from_config(model.scheduler_config), batch


def configure(world, kind: str = "text", tokens: int = 2) -> AdapterConfig:
    return AdapterConfig.for_unet(world[1].config, user_dim=USER_DIM, kind=kind, tokens=tokens)


def loss_of(world, objective, adapter, key=KEY, **change):
    _, unet, text_encoder, schedule, batch = world
    return evaluate(objective, adapter, unet, (text_encoder,), schedule, VAE, batch | change, key)


@pytest.mark.parametrize("kind", KINDS)
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


def torch_errors(theirs, schedule, batch, adapter, factor: float, **conditions) -> tuple[np.ndarray, ...]:
    """(pw, pl, rw, rl) in torch for the noise and timesteps that `KEY` draws; `conditions` are for the UNet."""
    *_, sample_w, sample_l, noise_key, time_key = jax.random.split(KEY, 6)

    def to_torch(x):
        return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)

    timesteps = torch.from_numpy(np.array(spread_timesteps(time_key, PAIRS, 0.0, float(schedule.steps))))
    noise = to_torch(latent_noise(noise_key, batch["chosen"]))
    forward = DDPMScheduler.from_config(theirs.scheduler.config)
    policy = adapted_unet(theirs.unet, adapter, torch.from_numpy(np.array(batch["user"])), torch.ones(PAIRS))
    errors = []
    for unet in (policy, theirs.unet):
        for side, key in (("chosen", sample_w), ("rejected", sample_l)):
            mean, log_variance = to_torch(batch[side]).chunk(2, dim=1)
            clean = factor * (mean + (log_variance / 2).exp() * to_torch(latent_noise(key, batch[side])))
            noisy = forward.add_noise(clean, noise, timesteps)
            predicted = unet(noisy, timesteps, **conditions).sample
            errors.append(((predicted - noise) ** 2).mean(dim=(1, 2, 3)).double().numpy())
    return tuple(errors)


def assert_as_in_torch(loss, metrics, errors) -> None:
    """Everything logged, from the four errors of torch, at MILD."""
    pw, pl, rw, rl = errors
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


@pytest.mark.parametrize(("kind", "tokens"), [("published", 1), ("text", 2)])
def test_loss_and_metrics_as_in_torch(world, kind, tokens):
    theirs, _, _, schedule, batch = world
    adapter = random_adapter(configure(world, kind, tokens))
    text = theirs.text_encoder(torch.from_numpy(np.array(batch["input_ids"]))).last_hidden_state
    errors = torch_errors(theirs, schedule, batch, adapter, FACTOR, encoder_hidden_states=text)
    assert_as_in_torch(*loss_of(world, MILD, adapter), errors)


def test_sdxl_as_in_torch(sdxl):
    """Both text encoders, pooled text, and sizes: original, crop and target."""
    theirs, model = sdxl[1], load_stable_diffusion(sdxl[0])
    side = model.unet.config.sample_size
    moments = torch.cat([tensor(2 * PAIRS, side, side, 4), torch.full((2 * PAIRS, side, side, 4), -1.0)], dim=-1)
    first, second = model.token_ids(["a cat", "cat at a cat", "t", ""])
    batch = {
        "chosen": as_jax(3 * moments[:PAIRS]),
        "rejected": as_jax(3 * moments[PAIRS:]),
        "user": as_jax(tensor(PAIRS, USER_DIM, seed=1)),
        "input_ids": jnp.asarray(first[:PAIRS]),
        "empty_ids": jnp.asarray(first[PAIRS]),
        "input_ids_2": jnp.asarray(second[:PAIRS]),
        "empty_ids_2": jnp.asarray(second[PAIRS]),
        "original_size": jnp.asarray([[64, 96], [700, 512], [8, 8]]),
        "crop": jnp.asarray([[0, 3], [94, 0], [0, 0]]),
    }
    schedule = NoiseSchedule.from_config(model.scheduler_config)
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, tokens=2))
    args = (MILD, adapter, model.unet, model.text_encoders, schedule, model.vae.config, batch, KEY)

    with torch.no_grad():
        outputs = [
            encoder(torch.from_numpy(ids[:PAIRS]).long(), output_hidden_states=True)
            for encoder, ids in ((theirs.text_encoder, first), (theirs.text_encoder_2, second))
        ]
        target = side * model.vae.config.downscale
        sizes = np.concatenate([batch["original_size"], batch["crop"], np.full((PAIRS, 2), target)], axis=1)
        added = {"text_embeds": outputs[1].text_embeds, "time_ids": torch.from_numpy(sizes.astype(np.float32))}
        errors = torch_errors(
            theirs,
            schedule,
            batch,
            adapter,
            model.vae.config.scaling_factor,
            encoder_hidden_states=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            added_cond_kwargs=added,
        )
    assert_as_in_torch(*evaluate(*args), errors)


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


def test_timesteps_cover_the_range_evenly():
    """One in each of 16 parts of [200, 800), every pair as likely to get any part."""
    draw = jax.vmap(lambda key: spread_timesteps(key, 16, 200.0, 800.0))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    parts = np.sort((drawn - 200) // 37.5, axis=1)
    assert (parts == np.arange(16)).mean() > 0.99  # 37.5 steps a part: rounding down may cross a border
    assert drawn.min() == 200 and drawn.max() == 799
    means = drawn.mean(axis=0)  # of each pair: uniform with deviation 600/√12
    assert np.abs(means - 499.5).max() < 4.5 * 600 / np.sqrt(12 * 2000)
    assert (np.diff(drawn[:, 0]) != 0).any()


def test_spread_timesteps_of_one_pair_stay_in_range():
    drawn = np.asarray(jax.vmap(lambda key: spread_timesteps(key, 1, 0.0, 1000.0))(jax.random.split(KEY, 5000)))
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert abs(drawn.mean() - 499.5) < 4.5 * 1000 / np.sqrt(12 * 5000)
