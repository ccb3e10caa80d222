"""The native adapter file: names and orientation of torch, bit-equal both ways, strict."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support.torch_adapters import random_adapter

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import FORMAT, read_metadata, read_tensors
from psa_jax.interop.native import adapter_arrays, load_adapter, save_adapter, with_arrays
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig

LAYERS = ((16, 2), (24, 3), (16, 2))
CROSS = 20


def make(kind: str, tokens: int = 4, qk_dim: int | None = None):
    return random_adapter(AdapterConfig(kind, tokens, 7, CROSS, LAYERS, qk_dim), seed=tokens)


@pytest.fixture
def saved(tmp_path):
    """A good file, to damage."""
    path = tmp_path / "psa_adapter.safetensors"
    save_adapter(make("text"), path, {})
    return path


def rewrite(path, change, keep_metadata: bool = True):
    """Writes the file again with torch after `change(tensors)`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata if keep_metadata else None)


def refused(path, layers=LAYERS, cross_dim=CROSS) -> str:
    with pytest.raises(PSAError) as caught:
        load_adapter(path, layers, cross_dim)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("kind", "tokens", "qk_dim"),
    [(kind, tokens, None) for kind in ADAPTER_KINDS for tokens in (1, 2, 4)]
    + [("text", 4, 6), ("concept", 2, 6), ("prompt", 4, 10), ("rewrite", 2, 6), ("edit", 4, 10)],
)
def test_save_and_load_is_bit_equal(tmp_path, kind, tokens, qk_dim):
    adapter, path = make(kind, tokens, qk_dim), tmp_path / "deep" / "a.safetensors"
    save_adapter(adapter, path, {"steps": 5})
    loaded = load_adapter(path, LAYERS, CROSS)
    assert loaded.config == adapter.config
    ours, theirs = adapter_arrays(loaded), adapter_arrays(adapter)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == jnp.float32
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]

    again = tmp_path / "again.safetensors"
    save_adapter(loaded, again, {"steps": 5})
    assert again.read_bytes() == path.read_bytes()


def shapes(path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in safetensors.torch.load_file(path).items()}


def test_names_and_shapes_in_torch(tmp_path):
    path = tmp_path / "a.safetensors"
    projection = {
        "user_proj.proj.weight": (2 * CROSS, 7),
        "user_proj.proj.bias": (2 * CROSS,),
        "user_proj.norm.weight": (CROSS,),
        "user_proj.norm.bias": (CROSS,),
    }
    upstream = {f"psa_adapter.{i}.to_{p}_user.0.weight": (w, CROSS) for i, (w, _) in enumerate(LAYERS) for p in "kv"}
    save_adapter(make("published", 2), path, {})
    assert shapes(path) == projection | upstream

    save_adapter(make("text", 2, qk_dim=6), path, {})
    low = {name: (6, CROSS) if "to_k" in name else shape for name, shape in upstream.items()}
    asks = {f"psa_adapter.{i}.to_q_user.0.weight": (6, CROSS) for i in range(3)}
    assert shapes(path) == projection | low | asks

    save_adapter(make("concept", 2), path, {})
    asks = {f"psa_adapter.{i}.to_q_user.0.weight": (w, w) for i, (w, _) in enumerate(LAYERS)}
    assert shapes(path) == projection | upstream | asks

    save_adapter(make("prompt", 2), path, {})
    once = {f"prompt_adapter.to_{p}_user.weight": (CROSS, CROSS) for p in "qkv"}
    assert shapes(path) == projection | once | {"prompt_adapter.to_out.weight": (CROSS, CROSS)}

    save_adapter(make("rewrite", 2), path, {})
    asks = {f"psa_adapter.{i}.to_q_user.0.weight": (w, CROSS) for i, (w, _) in enumerate(LAYERS)}
    gates = {f"psa_adapter.{i}.to_v_user.0.weight": (heads, CROSS) for i, (_, heads) in enumerate(LAYERS)}
    hidden = {f"psa_adapter.{i}.hidden_user.0.weight": (CROSS, CROSS) for i in range(3)}
    out = {f"psa_adapter.{i}.to_out_user.0.weight": (w, CROSS) for i, (w, _) in enumerate(LAYERS)}
    assert shapes(path) == projection | upstream | asks | gates | hidden | out

    save_adapter(make("edit", 2), path, {})
    gates = {"prompt_adapter.to_v_user.weight": (5, CROSS)}  # heads: the most, up to 8, that divide 20
    hidden = {"prompt_adapter.hidden.weight": (4 * CROSS, CROSS), "prompt_adapter.hidden.bias": (4 * CROSS,)}
    out = {"prompt_adapter.to_out.weight": (CROSS, 4 * CROSS), "prompt_adapter.to_out.bias": (CROSS,)}
    assert shapes(path) == projection | once | gates | hidden | out


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_a_torch_linear_with_a_tensor_of_the_file_does_the_same(tmp_path, kind):
    adapter, path = make(kind), tmp_path / "a.safetensors"
    save_adapter(adapter, path, {})
    tensors = safetensors.torch.load_file(path)
    layer = adapter.layers[0]
    before = kind in ("prompt", "edit")
    prefix, suffix = ("prompt_adapter.", "_user.weight") if before else ("psa_adapter.0.", "_user.0.weight")
    checks = {"user_proj.proj.weight": adapter.user_proj.kernel}
    for name in ("to_q", "to_k", "to_v"):
        if getattr(layer, name) is not None:
            checks[prefix + name + suffix] = getattr(layer, name)
    for name in ("hidden", "to_out"):
        if getattr(layer, name) is not None:
            checks[f"prompt_adapter.{name}.weight" if before else prefix + name + suffix] = getattr(layer, name)
    for name, kernel in checks.items():
        x = torch.randn(3, tensors[name].shape[1], generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.linear(x, tensors[name])
        np.testing.assert_allclose(x.numpy() @ np.asarray(kernel[...]), expected, rtol=0, atol=1e-5, err_msg=name)


def test_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(make("concept", 2, qk_dim=6), path, {"encoder": "features", "kind": "published"})
    with safe_open(path, framework="pt") as file:
        stored = file.metadata()
    assert json.loads(stored["psa"]) == read_metadata(path) | {"format": FORMAT}
    assert read_metadata(path) == {
        "kind": "concept",  # what the tensors are, whatever the caller adds
        "tokens": 2,
        "user_dim": 7,
        "cross_dim": CROSS,
        "layers": [[16, 2], [24, 3], [16, 2]],
        "qk_dim": 6,
        "encoder": "features",
    }


@pytest.mark.parametrize("tokens", [1, 2])
def test_without_metadata_a_file_is_published(tmp_path, tokens):
    adapter, path = make("published", tokens), tmp_path / "a.safetensors"
    save_adapter(adapter, path, {})
    # A released adapter has some W_k, which with one token says nothing.
    rewrite(
        path, lambda t: t.update({n: x + 1.0 for n, x in t.items() if "to_k" in n and tokens == 1}), keep_metadata=False
    )
    assert read_metadata(path) == {}
    loaded = load_adapter(path, LAYERS, CROSS)
    assert loaded.config == adapter.config
    for name, array in adapter_arrays(adapter).items():
        np.testing.assert_array_equal(adapter_arrays(loaded)[name], array)


def test_one_token_is_written_with_a_zero_key(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(make("published", 1), path, {})
    tensors = safetensors.torch.load_file(path)
    keys = [name for name in tensors if "to_k" in name]
    assert len(keys) == len(LAYERS)
    assert all(tensors[name].count_nonzero() == 0 for name in keys)


@pytest.mark.parametrize(
    ("layers", "cross_dim"),
    [(LAYERS[:2], CROSS), (((16, 4), *LAYERS[1:]), CROSS), (LAYERS, 10)],
    ids=["count", "heads", "width"],
)
def test_another_base_model(saved, layers, cross_dim):
    assert "another base model" in refused(saved, layers, cross_dim)


@pytest.mark.parametrize(
    ("layers", "cross_dim", "says"),
    [
        (LAYERS[:2], CROSS, "unexpected tensor psa_adapter.2"),
        ((*LAYERS, (16, 2)), CROSS, "missing tensor psa_adapter.3"),
        (((24, 3), *LAYERS[1:]), CROSS, "psa_adapter.0.to_"),
        (LAYERS, 9, "does not fit a cross-attention width of 9"),
    ],
)
def test_another_base_model_without_metadata(tmp_path, layers, cross_dim, says):
    path = tmp_path / "a.safetensors"
    save_adapter(make("published"), path, {})
    rewrite(path, lambda tensors: None, keep_metadata=False)
    assert says in refused(path, layers, cross_dim)


def test_no_such_file(tmp_path):
    assert "no such adapter file" in refused(tmp_path / "a.safetensors")
    assert "no such adapter file" in refused(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    assert "not a whole safetensors file" in refused(saved)


def _set(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("psa_adapter.1.to_q_user.0.weight"), "missing tensor psa_adapter.1.to_q_user.0.weight"),
        (lambda t: t.pop("user_proj.norm.bias"), "missing tensor user_proj.norm.bias"),
        (lambda t: t.pop("user_proj.proj.weight"), "user_proj.proj.weight is missing"),
        (lambda t: t.update(surprise=torch.zeros(1)), "unexpected tensor surprise"),
        (lambda t: t.update({"user_proj.norm.bias": torch.zeros(3)}), "user_proj.norm.bias has shape (3,)"),
        (
            _set("psa_adapter.1.to_v_user.0.weight", float("nan")),
            "psa_adapter.1.to_v_user.0.weight has values that are not",
        ),
        (_set("user_proj.proj.bias", float("inf")), "user_proj.proj.bias has values that are not finite"),
        (
            lambda t: t.update({"user_proj.proj.weight": torch.zeros(2 * CROSS, 7)}),
            "holds 2 tokens, its metadata say 4",
        ),
        (
            lambda t: t.update({"user_proj.proj.weight": torch.zeros(4 * CROSS, 8)}),
            "holds 8 user_dim, its metadata say 7",
        ),
    ],
)
def test_tensors_that_do_not_belong(saved, change, says):
    rewrite(saved, change)
    assert says in refused(saved)


NAME = "psa_adapter.1.to_v_user.0.weight"


@pytest.mark.parametrize("framework", ["numpy", "pt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_float_is_read_as_torch_casts_it(saved, dtype, framework):
    rewrite(saved, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    found = read_tensors(saved, framework)
    for name, tensor in safetensors.torch.load_file(saved).items():
        assert str(found[name].dtype).removeprefix("torch.") == "float32"
        np.testing.assert_array_equal(np.asarray(found[name]), tensor.float().numpy())
    load_adapter(saved, LAYERS, CROSS)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
    ids=str,
)
def test_what_is_no_float_of_16_bits_or_more_is_refused(saved, dtype, word):
    rewrite(saved, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    line = refused(saved)
    assert line == f"{NAME} is of dtype {word} (supported: F64, F32, F16, BF16); " + line.rpartition("; ")[2]
    for framework in ("numpy", "pt"):  # whoever reads
        with pytest.raises(PSAError, match=f"{NAME} is of dtype {word}"):
            read_tensors(saved, framework)


def test_a_number_beyond_float32_is_refused(saved):
    def change(tensors):
        tensors[NAME] = tensors[NAME].double()
        tensors[NAME][0, 0] = 1e300

    rewrite(saved, change)
    assert f"{NAME} has values that are not finite in float32" in refused(saved)
    with pytest.raises(PSAError, match="not finite"):
        read_tensors(saved, "pt")


def with_header(path, change) -> None:
    """Writes the file again with another header: `change` takes and gives its text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_two_tensors_of_one_name_are_refused(saved):
    """safetensors itself keeps the last of them, with whatever type and shape it claims."""
    header = json.loads(saved.read_bytes()[8 : 8 + int.from_bytes(saved.read_bytes()[:8], "little")])
    again = json.dumps(header[NAME] | {"dtype": "I32"})
    with_header(saved, lambda text: text.rstrip()[:-1] + f', "{NAME}": {again}}}')
    with safe_open(saved, framework="pt") as file:
        assert file.get_tensor(NAME).dtype == torch.int32
    assert f"the key '{NAME}' is given twice" in refused(saved)


def test_a_name_that_would_break_the_line_is_refused(saved):
    with_header(saved, lambda text: text.replace('"user_proj.norm.bias"', '"a\\nb"'))
    assert "a tensor is named 'a\\nb'" in refused(saved)


def test_two_metadata_of_one_name_are_refused(saved):
    with_header(saved, lambda text: text.replace('{"psa":', '{"psa":"{}","psa":', 1))
    with safe_open(saved, framework="pt") as file:
        assert file.metadata().keys() == {"psa"}
    assert "the key 'psa' is given twice" in refused(saved)


@pytest.mark.parametrize(
    ("psa", "says"),
    [
        ("{", "its metadata: not valid JSON"),
        ("[]", "its metadata: expected a JSON object, found a list"),
        ('{"format": "psa_jax.adapter/2"}', "not of psa_jax.adapter/1"),
        (json.dumps({"format": FORMAT, "kind": "loud"}), "'loud' is unknown"),
        (json.dumps({"format": FORMAT, "layers": [16, 24, 16]}), "layers in its metadata is"),
        ('{"a": ' * 9000 + "1" + "}" * 9000, "nested deeper"),
        (f'{{"format": "{FORMAT}", "format": "{FORMAT}"}}', "'format' is given twice"),
        (f'{{"format": "{FORMAT}", "tokens": NaN}}', "holds NaN"),
        *(
            (json.dumps({"format": FORMAT, name: value}), f"{name} in its metadata is")
            for name, value in (
                ("kind", ["text"]),
                ("tokens", "4"),
                ("tokens", True),
                ("tokens", 1.5),
                ("user_dim", -7),
                ("cross_dim", "20"),
                ("cross_dim", 1 << 40),
                ("layers", {}),
                ("layers", []),
                ("layers", [[16, 0]]),
                ("layers", [["16", 2]]),
                ("qk_dim", "6"),
                ("encoder", 3),
                ("encoder_fingerprint", None),
                ("base_model", ["x"]),
                ("family", {}),
                ("standardised", "no"),
                ("steps", "1"),
                ("objective", []),
                ("versions", "1"),
            )
        ),
    ],
)
def test_metadata_that_cannot_be(saved, psa, says):
    safetensors.torch.save_file(safetensors.torch.load_file(saved), saved, {"psa": psa})
    assert says in refused(saved)


def test_nothing_is_written_when_values_are_not_finite(tmp_path):
    adapter, path = make("text"), tmp_path / "out" / "a.safetensors"
    arrays = adapter_arrays(adapter)
    name = "psa_adapter.2.to_v_user.0.weight"
    broken = with_arrays(adapter.config, arrays | {name: arrays[name].at[0, 0].set(jnp.nan)})
    with pytest.raises(PSAError) as caught:
        save_adapter(broken, path, {})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.*"))


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(PSAError, match="cannot be written .no space left"):
        save_adapter(make("concept"), saved, {})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
