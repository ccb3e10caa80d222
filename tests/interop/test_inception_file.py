"""Files with FID's Inception-v3: as published, as torch saves it today, as safetensors, and what is not one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file
from support.torch_inception import published, random_inception

from psa_jax.errors import PSAError
from psa_jax.interop.inception_file import load_inception


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_inception().state_dict()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return published(random_inception(), tmp_path_factory.mktemp("published") / "inception.pth")


def refused(path: Path) -> str:
    with pytest.raises(PSAError) as caught:
        load_inception(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400
    return text


def test_every_format_gives_the_same_numbers(file, state, tmp_path):
    """The published file has the classifier; whether it counts batches differs by the torch that wrote it."""
    torch.save(state, tmp_path / "zip.pth")
    counted = {name: each for name, each in state.items() if "num_batches" not in name}
    save_file({name: each.contiguous() for name, each in counted.items()}, tmp_path / "a.safetensors")
    first = nnx.to_flat_state(nnx.state(load_inception(file).model))
    assert len(first) == 470 and dict(first)["Mixed_7c", "branch_pool", "bn", "var"][...].shape == (192,)
    for path in (tmp_path / "zip.pth", tmp_path / "a.safetensors"):
        loaded = load_inception(path)
        for (name, ours), (_, theirs) in zip(first, nnx.to_flat_state(nnx.state(loaded.model)), strict=True):
            np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(name))
        assert loaded.weights == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_missing_unknown_or_of_another_shape(state, tmp_path):
    path = tmp_path / "a.safetensors"
    small = {name: torch.zeros(1) for name in state}  # names are compared before shapes
    missing = {name: each for name, each in small.items() if name != "Mixed_6b.branch_pool.bn.running_var"}
    save_file(missing, path)
    assert "missing tensors: Mixed_6b.branch_pool.bn.running_var; the file does not belong to FID's" in refused(path)
    save_file(small | {"AuxLogits.fc.weight": torch.zeros(1)}, path)
    assert "unexpected tensors: AuxLogits.fc.weight; the file does not belong to FID's Inception-v3" in refused(path)
    save_file(small, path)
    assert "Conv2d_1a_3x3.bn.bias has shape (1,), FID's Inception-v3 asks for (32,)" in refused(path)


def test_numbers_that_are_not_finite(state, tmp_path):
    path = tmp_path / "a.safetensors"
    broken = state["Mixed_5b.branch1x1.bn.bias"].clone()
    broken[3] = torch.nan
    save_file({name: each.contiguous() for name, each in state.items()} | {"Mixed_5b.branch1x1.bn.bias": broken}, path)
    assert "Mixed_5b.branch1x1.bn.bias has values that are not finite" in refused(path)


@pytest.mark.parametrize("length", [0, 30, 1_000, 90_000, 1_000_000, -1])
def test_a_truncated_file(file, tmp_path, length):
    path = tmp_path / "inception.pth"
    path.write_bytes(file.read_bytes()[:length])
    assert "not a whole file of torch.save" in refused(path)


def test_files_that_are_no_network_of_this_kind(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pth")
    assert "missing tensors: Conv2d_1a_3x3.bn.bias, " in refused(tmp_path / "linear.pth")
    torch.save({"state_dict": torch.nn.Linear(2, 3).state_dict()}, tmp_path / "nested.pth")
    assert "'state_dict' is a group of tensors; give the state dict of FID's" in refused(tmp_path / "nested.pth")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "whole.pth")
    assert "refused, nothing in it was run" in refused(tmp_path / "whole.pth")
    (tmp_path / "page.pth").write_text("<html>")
    assert "not a whole file of torch.save" in refused(tmp_path / "page.pth")
    (tmp_path / "page.safetensors").write_text("<html>")
    assert "not a whole safetensors file" in refused(tmp_path / "page.safetensors")
    assert "no such file" in refused(tmp_path / "absent.pth")
