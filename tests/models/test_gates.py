"""The gate by categories: its formula in torch, its limits, and the strength of the adapter behind it."""

import jax.numpy as jnp
import numpy as np
import torch
from support.torch_adapters import as_jax, file_tensors, random_adapter, untrained_adapter
from support.torch_models import tensor

from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.gates import combine
from psa_jax.torch.adapter import UserAdapter

CONFIG = AdapterConfig("edit", 0, 7, 20, ((16, 2), (24, 3)), gate="categories")
TEXT, USERS = tensor(3, 9, 20, seed=1), tensor(3, 7, seed=2)


def formula(tensors, text, user):
    """p_k·b_k and e + s·g·edit(e), from the tensors of the file."""

    def half(name, x):
        hidden = torch.nn.functional.gelu(x @ tensors[f"{name}.0.weight"].T + tensors[f"{name}.0.bias"])
        return hidden @ tensors[f"{name}.2.weight"].T + tensors[f"{name}.2.bias"]

    asked = torch.sigmoid(torch.log(torch.exp(half("prompt_gate", text)).sum(1)))
    parts = asked * torch.sigmoid(half("user_gate", user))
    w = {name.removeprefix("prompt_adapter."): t for name, t in tensors.items() if name.startswith("prompt_adapter.")}
    hidden = torch.nn.functional.gelu(text @ w["hidden.weight"].T + w["hidden.bias"])
    return parts, hidden @ w["to_out.weight"].T + w["to_out.bias"]


def test_as_in_torch():
    adapter = random_adapter(CONFIG, seed=3)
    parts, edit = formula(file_tensors(adapter), TEXT, USERS)
    gate = 1 - (1 - parts).prod(1)
    assert float(gate.min()) > 0.1 and float(gate.std()) > 0.01
    np.testing.assert_allclose(adapter.gate.parts(as_jax(TEXT), as_jax(USERS)), parts, rtol=1e-5)
    scale = np.float32([0.0, 0.4, 1.0])
    ours = adapter.edit(as_jax(TEXT), as_jax(USERS), jnp.asarray(scale))
    expected = TEXT + torch.from_numpy(scale)[:, None, None] * gate[:, None, None] * edit
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[0], TEXT[0])  # scale 0 is the base model, exactly

    runtime = UserAdapter(CONFIG)
    runtime.load_state_dict(file_tensors(adapter))
    np.testing.assert_allclose(runtime(TEXT, USERS, torch.from_numpy(scale)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(runtime.gates(TEXT, runtime.bans(USERS)), parts, rtol=1e-5)


def test_untrained_it_changes_no_bit():
    adapter = untrained_adapter(CONFIG)
    np.testing.assert_array_equal(adapter.edit(as_jax(TEXT), as_jax(USERS), jnp.ones(3)), TEXT)


def test_who_bans_nothing_gets_the_base_model_and_who_bans_it_the_whole_edit():
    runtime = UserAdapter(CONFIG)
    runtime.load_state_dict(file_tensors(random_adapter(CONFIG)))
    np.testing.assert_array_equal(runtime.edit(TEXT, torch.zeros(3, 7), torch.ones(3)), TEXT)
    asked = runtime.gates(TEXT, torch.ones(3, 7))
    one = torch.zeros(3, 7)
    one[:, 2] = 1.0
    moved = runtime.edit(TEXT, one, torch.ones(3)) - TEXT
    _, edit = formula(runtime.state_dict(), TEXT, USERS)
    np.testing.assert_allclose(moved, asked[:, 2, None, None] * edit, rtol=0, atol=1e-5)


def test_the_strength_is_monotone_in_the_scale():
    """Each of eleven scales from 0 to 1 moves every text state further along one line."""
    adapter = random_adapter(CONFIG, seed=1)
    text, users = as_jax(TEXT), as_jax(USERS)
    moved = np.stack([adapter.edit(text, users, jnp.full(3, s)) - text for s in np.linspace(0, 1, 11)])
    lengths = np.linalg.norm(moved.reshape(11, -1), axis=1)
    assert lengths[0] == 0.0 and (np.diff(lengths) > 0).all()
    np.testing.assert_allclose(lengths, np.linspace(0, 1, 11) * lengths[-1], rtol=1e-4, atol=1e-5)


def test_combine_by_hand():
    parts = jnp.asarray([[0.0] * 7, [1.0, *[0.0] * 6], [0.5, 0.5, *[0.0] * 5]])
    np.testing.assert_allclose(combine(parts), [0.0, 1.0, 0.75], rtol=1e-6)
