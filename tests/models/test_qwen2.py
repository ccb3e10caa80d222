"""Qwen2 against transformers with random parameters: states, scores of tokens, greedy continuations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.torch_models import TOLERANCE, difference, randomise, run, tensor
from support.torch_qwen2 import QWENS, flax_qwen, left_padded, torch_qwen
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from psa_jax.models.qwen2 import Qwen2, RMSNorm


def to_jax(ids: torch.Tensor, mask: torch.Tensor) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray(mask.numpy(), bool)


def states_and_scores(model: Qwen2, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    last = model(ids, mask).last
    return last, model.logits(last)


@pytest.mark.parametrize(("name", "length"), list(zip(QWENS, (9, 200, 13), strict=True)))
def test_states_and_scores_with_padding(name, length, tmp_path):
    theirs = torch_qwen(name)
    ours = flax_qwen(theirs, tmp_path)
    ids, mask = left_padded([length, length - 4, 1, length - 1], length)
    mask[3] = mask[3].flip(0)  # one row is padded on the right
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    last, scores = run(states_and_scores, ours, *to_jax(ids, mask))

    valid = mask.bool()
    assert difference(last[valid.numpy()], expected.hidden_states[-1][valid]) <= TOLERANCE
    assert difference(scores[valid.numpy()], expected.logits[valid]) <= TOLERANCE
    assert np.isfinite(last).all()  # padding too: NaN times zero would spoil a sum


def greedy(model: Qwen2, ids: torch.Tensor, mask: torch.Tensor, stops: tuple[int, ...], count: int) -> np.ndarray:
    def generate(model, ids, mask):
        return model.generate(ids, mask, max_new_tokens=count, stop_tokens=stops, pad_token=stops[0])

    return np.asarray(run(generate, model, *to_jax(ids, mask)))


@pytest.mark.parametrize("name", QWENS)
def test_greedy_tokens(name, tmp_path):
    theirs = torch_qwen(name)
    ours = flax_qwen(theirs, tmp_path)
    ids, mask = left_padded([7, 2, 5, 6], 7)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    free = theirs.generate(ids, **settings)[:, 7:]
    assert len(set(free.flatten().tolist())) > 4  # something to tell apart

    stops = (int(free[1, 2]), 96)  # the second row ends with its third token at the latest
    expected = theirs.generate(ids, **settings | {"eos_token_id": list(stops), "pad_token_id": stops[0]})[:, 7:]
    got = greedy(ours, ids, mask, stops, 10)
    assert got.shape == (4, 10) and (got[1, 3:] == stops[0]).all()
    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)
    assert (got[:, expected.shape[1] :] == stops[0]).all()  # theirs is as long as its longest row


def test_generation_ends_when_every_row_has_ended(tmp_path):
    theirs = torch_qwen("odd")
    ours = flax_qwen(theirs, tmp_path)
    ids, mask = left_padded([3], 3)
    first = int(theirs(ids).logits[0, -1].argmax())
    np.testing.assert_array_equal(greedy(ours, ids, mask, (first,), 4), [[first] * 4])
    np.testing.assert_array_equal(greedy(ours, ids, mask, (first,), 1), [[first]])


def test_bfloat16_runs_and_stays_near_torch(tmp_path):
    theirs = torch_qwen("tied_groups").to(torch.bfloat16)
    ours = flax_qwen(theirs, tmp_path, dtype=jnp.bfloat16)
    ids, mask = left_padded([6, 3], 6)
    last, scores = run(states_and_scores, ours, *to_jax(ids, mask))
    assert last.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
    valid = mask.bool()
    assert difference(last[valid.numpy()].astype(jnp.float32), expected[valid]) < 0.15
    assert greedy(ours, ids, mask, (96,), 3).shape == (2, 3)


def test_the_norm_in_bfloat16_is_torchs_to_the_last_bit():
    theirs = randomise(Qwen2RMSNorm(200, eps=1e-6), seed=0).to(torch.bfloat16)  # statistics in float32
    ours = RMSNorm(200, 1e-6)
    ours.scale[...] = jnp.asarray(theirs.weight.float().numpy())
    ours = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours)
    x = (100 * tensor(1, 3, 200)).to(torch.bfloat16)
    got = run(lambda norm, x: norm(x), ours, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), theirs(x).float())


def test_an_id_beyond_the_vocabulary_does_not_pass_for_another(tmp_path):
    ours = flax_qwen(torch_qwen("odd"), tmp_path)
    ids = jnp.asarray([[1, 2, 97]], jnp.int32)
    last = run(lambda model: model(ids, jnp.ones((1, 3), bool)).last, ours)
    assert np.isnan(last[0, 2]).all()
