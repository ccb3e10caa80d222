"""The edit of SDXL's pooled text: formulas in torch, both gates, limits, file, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from support.torch_adapters import (
    as_jax,
    edited_pooled,
    file_tensors,
    gates_of_prompts,
    random_adapter,
    untrained_adapter,
)
from support.torch_models import UNETS, tensor

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import adapter_hash, read_metadata
from psa_jax.interop.native import adapter_arrays, load_adapter, save_adapter, to_file
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.torch import load_adapter as load_in_torch
from psa_jax.torch.adapter import UserAdapter

LAYERS = ((16, 2), (24, 3))
SIZES = {"user_dim": 7, "cross_dim": 20, "layers": LAYERS, "pooled": 30}  # 5 heads
ATTENTION = AdapterConfig("edit", 4, **SIZES)
CATEGORIES = AdapterConfig("edit", 0, **SIZES, gate="categories", mixing=True)
CONFIGS = {
    "attention": ATTENTION,
    "one token": AdapterConfig("edit", 1, **SIZES, hidden=12),
    "categories": CATEGORIES,
    "mixing": AdapterConfig("edit", 4, **SIZES, mixing=True),
}
TEXT, USERS = tensor(3, 9, 20, seed=1), tensor(3, 7, seed=2)
# Of an absent negative prompt it is zero; of another encoder it may be long.
POOLED = tensor(3, 30, seed=3) * torch.tensor([1.0, 0.0, 40.0])[:, None]
SCALE = torch.tensor([0.4, 1.0, 1.0])
XL = UNetConfig.from_json(UNETS["sdxl_shape"])


def of_jax(adapter, scale=SCALE, users=USERS) -> np.ndarray:
    return np.asarray(adapter.edit_pooled(as_jax(POOLED), as_jax(TEXT), as_jax(users), as_jax(scale)))


def in_torch(adapter) -> UserAdapter:
    runtime = UserAdapter(adapter.config)
    runtime.load_state_dict(file_tensors(adapter))
    return runtime


@pytest.mark.parametrize("name", CONFIGS)
def test_as_in_torch(name):
    adapter = random_adapter(CONFIGS[name], seed=3)
    tensors = file_tensors(adapter)
    gates = gates_of_prompts(tensors, TEXT, USERS, heads=5)
    assert gates.shape == (3, 1 if name == "categories" else 5) and float(gates.std()) > 0.01
    expected = edited_pooled(tensors, POOLED, gates, SCALE)
    assert (expected - POOLED).abs().max() > 0.1
    np.testing.assert_allclose(of_jax(adapter), expected, rtol=0, atol=1e-4)
    states, pooled = in_torch(adapter)(TEXT, USERS, SCALE, POOLED)
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(states, adapter.edit(as_jax(TEXT), as_jax(USERS), as_jax(SCALE)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_untrained_it_changes_no_bit(name):
    adapter = untrained_adapter(CONFIGS[name])
    np.testing.assert_array_equal(of_jax(adapter, torch.ones(3)), POOLED)
    assert torch.equal(in_torch(adapter)(TEXT, USERS, torch.ones(3), POOLED)[1], POOLED)
    assert np.abs(adapter.layers[0].pooled_hidden[...]).max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_strength_is_monotone_in_the_scale_and_zero_is_the_base_model(name):
    adapter = random_adapter(CONFIGS[name], seed=1)
    np.testing.assert_array_equal(of_jax(adapter, torch.zeros(3)), POOLED)
    scales = np.linspace(0, 1, 6, dtype=np.float32)
    moved = np.stack([of_jax(adapter, torch.full((3,), float(s))) - POOLED.numpy() for s in scales])
    lengths = np.linalg.norm(moved.reshape(6, -1), axis=1)
    assert (np.diff(lengths) > 0).all()
    np.testing.assert_allclose(lengths, scales * lengths[-1], rtol=1e-4, atol=1e-4)


def test_it_is_for_its_user_and_no_other_row_changes_it():
    for config in (ATTENTION, CATEGORIES):
        adapter = random_adapter(config)
        other = of_jax(adapter, users=torch.cat([USERS[:1], USERS[1:].flip(0)]))
        np.testing.assert_allclose(other[0], of_jax(adapter)[0], rtol=0, atol=1e-6)
        assert np.abs(other[1:] - of_jax(adapter)[1:]).max() > 1e-3
    runtime = in_torch(random_adapter(CATEGORIES))  # who bans nothing gets the base model
    _, pooled = runtime.edit(TEXT, torch.zeros(3, 7), torch.ones(3), POOLED)
    assert torch.equal(pooled, POOLED)


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision(name):
    """The type of the base model's text is that of the result; no type is widened in silence."""
    adapter = random_adapter(CONFIGS[name])
    pooled, text = (as_jax(each).astype(jnp.bfloat16) for each in (POOLED, TEXT))
    half = adapter.edit_pooled(pooled, text, as_jax(USERS), as_jax(SCALE))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), of_jax(adapter), rtol=0.02, atol=0.1)


def test_sizes_of_a_unet():
    config = AdapterConfig.for_unet(XL, user_dim=7, kind="edit", pooled=True)
    assert (config.pooled, config.cross_dim) == (24, 56) == (XL.pooled_dim, XL.cross_attention_dim)
    assert config.projections(56, 8)["pooled_hidden"] == (24, 96, True)
    before = AdapterConfig.for_unet(XL, user_dim=7, kind="edit")
    assert before.pooled == 0 and not {"pooled_hidden", "pooled_out"} & before.projections(56, 8).keys()
    assert "pooled" not in before.as_json() and config.as_json()["pooled"] == 24
    # What was drawn before at the start is drawn now.
    ours, earlier = (adapter_arrays(untrained_adapter(each)) for each in (config, before))
    assert len(ours) == len(earlier) + 4
    for name, array in earlier.items():
        np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "text"}, "adapter.pooled is given, which the text kind lacks; set it to false"),
        ({"kind": "prompt"}, "which the prompt kind lacks"),
        ({"pooled": 31}, "a pooled text of 31 numbers cannot be divided among the 5 heads of the gate"),
        ({"pooled": -5}, "pooled must be at least 0, got -5"),
    ],
)
def test_bad_sizes(change, says):
    with pytest.raises(PSAError, match=says):
        AdapterConfig(**{"kind": "edit", "tokens": 4, **SIZES} | change)


def test_a_base_model_without_pooled_text():
    with pytest.raises(PSAError, match="adapter.pooled is true, but the base model takes no pooled text"):
        AdapterConfig.for_unet(UNetConfig(), user_dim=7, kind="edit", pooled=True)
    adapter = random_adapter(ATTENTION)
    with pytest.raises(PSAError, match="edits a pooled text of 30 numbers, the base model has none"):
        adapter.edit_pooled(None, as_jax(TEXT), as_jax(USERS), jnp.ones(3))
    with pytest.raises(PSAError, match="edits a pooled text of 30 numbers, the base model has one of 24"):
        adapter.edit_pooled(jnp.zeros((3, 24)), as_jax(TEXT), as_jax(USERS), jnp.ones(3))
    for config in (ATTENTION, CATEGORIES):
        runtime = in_torch(random_adapter(config))
        with pytest.raises(PSAError, match="none was given; give pooled_prompt_embeds, too"):
            runtime(TEXT, USERS, SCALE)
        with pytest.raises(PSAError, match="a pooled text of 30 numbers, this one has 24"):
            runtime(TEXT, USERS, SCALE, torch.zeros(3, 24))


def test_adapters_without_it_leave_the_pooled_text_alone():
    for kind, gate, tokens in (("edit", "attention", 2), ("edit", "categories", 0), ("text", "attention", 2)):
        adapter = random_adapter(AdapterConfig(kind, tokens, 7, 20, LAYERS, gate=gate))
        pooled = as_jax(POOLED)
        assert adapter.edit_pooled(pooled, as_jax(TEXT), as_jax(USERS), jnp.ones(3)) is pooled
        assert adapter.edit_pooled(None, as_jax(TEXT), as_jax(USERS), jnp.ones(3)) is None
        assert in_torch(adapter)(TEXT, USERS, SCALE, POOLED)[1] is POOLED


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_read_back_by_both(tmp_path, name):
    adapter, path = random_adapter(CONFIGS[name]), tmp_path / "a.safetensors"
    save_adapter(adapter, path, {})
    assert read_metadata(path)["pooled"] == 30
    loaded, (runtime, _) = load_adapter(path, LAYERS, 20), load_in_torch(path)
    assert loaded.config == runtime.config == adapter.config
    np.testing.assert_array_equal(of_jax(loaded), of_jax(adapter))
    torch.testing.assert_close(
        runtime(TEXT, USERS, SCALE, POOLED)[1], torch.from_numpy(of_jax(adapter).copy()), rtol=0, atol=1e-4
    )
    hidden = adapter.config.hidden or 120
    shapes = {n: t.shape for n, t in safetensors.numpy.load_file(path).items() if "pooled" in n}
    assert shapes == {
        "prompt_adapter.pooled_hidden.weight": (hidden, 30),
        "prompt_adapter.pooled_hidden.bias": (hidden,),
        "prompt_adapter.pooled_out.weight": (30, hidden),
        "prompt_adapter.pooled_out.bias": (30,),
    }


def test_a_file_of_an_earlier_version_has_no_pooled_edit(tmp_path):
    """Nothing of it is written for adapters without it, so that their files and hashes are as before."""
    plain = AdapterConfig("edit", 4, 7, 20, LAYERS)
    adapter, path = random_adapter(plain), tmp_path / "a.safetensors"
    save_adapter(adapter, path, {})
    assert "pooled" not in read_metadata(path)
    assert load_adapter(path, LAYERS, 20).config == load_in_torch(path)[0].config == plain
    assert plain.pooled == 0 and "pooled" not in plain.as_json()
    known = AdapterConfig("edit", 0, 7, 20, LAYERS, gate="categories", mixing=True)
    as_before = "862459cf0705bf5d660d82e7fc96ffbf87260c4d498dd169b4c6a839cb0ec85c"  # of the version without the edit
    assert adapter_hash(to_file(random_adapter(known)), known) == as_before
    with_it = random_adapter(ATTENTION)
    assert adapter_hash(to_file(with_it), ATTENTION) != adapter_hash(to_file(adapter), plain)


@pytest.mark.parametrize(
    ("metadata", "change", "says"),
    [
        ({}, {"prompt_adapter.pooled_out.bias": None}, "missing tensor prompt_adapter.pooled_out.bias"),
        (
            {},
            {"prompt_adapter.pooled_out.bias": np.zeros(29, np.float32)},
            r"has shape \(29,\), the base model needs \(30",
        ),
        ({"pooled": None}, {}, "pooled in its metadata is 'None', not a whole number above zero"),
        ({"pooled": "30"}, {}, "pooled in its metadata is '30', not a whole number"),
        ({"pooled": True}, {}, "pooled in its metadata is 'True', not a whole number"),
        ({"pooled": 25}, {}, r"prompt_adapter.pooled_\w+.\w+ has shape"),
        ({"kind": "prompt"}, {}, "which the prompt kind lacks"),
    ],
)
def test_damaged_files(tmp_path, metadata, change, says):
    import json

    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(ATTENTION), path, {})
    with safetensors.safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["psa"])
    tensors = {n: t for n, t in (safetensors.numpy.load_file(path) | change).items() if t is not None}
    safetensors.numpy.save_file(tensors, path, {"psa": json.dumps(about | metadata)})
    for load in (lambda: load_adapter(path, LAYERS, 20), lambda: load_in_torch(path)):
        with pytest.raises(PSAError, match=says):
            load()
