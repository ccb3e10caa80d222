"""The self-attention of `edit` over the whole prompt: torch's own attention, both gates, file and limits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.torch_adapters import as_jax, file_tensors, random_adapter, untrained_adapter, user_tokens
from support.torch_models import tensor

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import read_metadata
from psa_jax.interop.native import load_adapter, save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.torch.adapter import UserAdapter

LAYERS = ((16, 2), (24, 3))
ATTENTION = AdapterConfig("edit", 4, 7, 20, LAYERS, mixing=True)
CATEGORIES = AdapterConfig("edit", 0, 7, 20, LAYERS, gate="categories", mixing=True)
PLAIN = AdapterConfig("edit", 4, 7, 20, LAYERS)
# The first token of a prompt is far longer than the others in the states that SDXL takes.
TEXT, USERS = tensor(3, 9, 20, seed=1) * torch.tensor([30.0, *[1.0] * 8])[None, :, None], tensor(3, 7, seed=2)
SCALE = torch.tensor([0.0, 0.4, 1.0])


def states(tensors, text, tokens):
    """W_o gelu(W_1 m + b_1) + b_o, with torch's MultiheadAttention of 5 heads for m."""
    w = {name.removeprefix("prompt_adapter."): t for name, t in tensors.items()}
    attention = torch.nn.MultiheadAttention(20, 5, bias=False, batch_first=True)
    attention.in_proj_weight.data = torch.cat([w[f"mix_{name}.weight"] for name in "qkv"])
    attention.out_proj.weight.data = w["mix_out.weight"]
    normal = torch.nn.LayerNorm(20, elementwise_affine=False)(text)
    seen = normal if tokens is None else torch.cat([normal, tokens], dim=1)
    with torch.no_grad():
        mixed = text + attention(normal, seen, seen, need_weights=False)[0]
    hidden = torch.nn.functional.gelu(mixed @ w["hidden.weight"].T + w["hidden.bias"])
    return hidden @ w["to_out.weight"].T + w["to_out.bias"]


@pytest.mark.parametrize("config", [ATTENTION, CATEGORIES], ids=["attention", "categories"])
def test_as_in_torch(config: AdapterConfig):
    adapter = random_adapter(config, seed=3)
    tensors = file_tensors(adapter)
    runtime = UserAdapter(config)
    runtime.load_state_dict(tensors)
    if config.by_categories:
        tokens, gate = None, 1 - torch.prod(1 - runtime.gates(TEXT, runtime.bans(USERS)), dim=-1)[:, None, None]
    else:
        tokens = user_tokens(tensors, USERS, 20)
        asked = torch.nn.functional.scaled_dot_product_attention(
            *(
                (x @ tensors[f"prompt_adapter.{name}_user.weight"].T).unflatten(-1, (5, -1)).transpose(1, 2)
                for x, name in ((TEXT, "to_q"), (tokens, "to_k"), (tokens, "to_v"))
            )
        )
        gate = asked.transpose(1, 2).repeat(1, 1, 1, 4).flatten(2)  # each head's number for its 4 of 20 columns
    expected = TEXT + SCALE[:, None, None] * gate * states(tensors, TEXT, tokens)
    ours = adapter.edit(as_jax(TEXT), as_jax(USERS), jnp.asarray(SCALE.numpy()))
    tolerance = {"rtol": 0, "atol": 1e-4}
    np.testing.assert_allclose(ours, expected, **tolerance)
    np.testing.assert_allclose(runtime(TEXT, USERS, SCALE), expected, **tolerance)
    np.testing.assert_array_equal(ours[0], TEXT[0])


def test_a_token_sees_those_after_it():
    """Without the self-attention, what follows a token does not change its edit."""
    changed = TEXT.clone()
    changed[:, -1] *= -1.0
    for config, same in ((PLAIN, True), (ATTENTION, False)):
        adapter = random_adapter(config, seed=1)
        first, second = (adapter.edit(as_jax(text), as_jax(USERS), jnp.ones(3))[:, 1] for text in (TEXT, changed))
        assert np.allclose(first, second, rtol=0, atol=1e-6) == same


@pytest.mark.parametrize("config", [ATTENTION, CATEGORIES], ids=["attention", "categories"])
def test_untrained_it_changes_no_bit(config: AdapterConfig):
    adapter = untrained_adapter(config)
    np.testing.assert_array_equal(adapter.edit(as_jax(TEXT), as_jax(USERS), jnp.ones(3)), TEXT)
    assert all(np.abs(getattr(adapter.layers[0], f"mix_{name}")[...]).max() > 0 for name in ("q", "k", "v", "out"))


@pytest.mark.parametrize("config", [ATTENTION, CATEGORIES], ids=["attention", "categories"])
def test_the_file_says_it_and_is_read_back(tmp_path, config: AdapterConfig):
    adapter, path = random_adapter(config), tmp_path / "a.safetensors"
    save_adapter(adapter, path, {})
    assert read_metadata(path)["mixing"] is True
    loaded = load_adapter(path, LAYERS, 20)
    assert loaded.config == config
    args = as_jax(TEXT), as_jax(USERS), jnp.ones(3)
    np.testing.assert_array_equal(loaded.edit(*args), adapter.edit(*args))


def test_without_it_the_file_is_as_before(tmp_path):
    save_adapter(random_adapter(PLAIN), tmp_path / "a.safetensors", {})
    assert "mixing" not in read_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["text", "prompt", "rewrite", "published", "concept"])
def test_other_kinds_have_none(kind: str):
    with pytest.raises(PSAError, match=f"which the {kind} kind lacks; use it with adapter.kind=edit"):
        AdapterConfig(kind, 4, 7, 20, LAYERS, mixing=True)
