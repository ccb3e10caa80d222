"""The node for ComfyUI, by the contract that ComfyUI documents: inputs, outputs, and errors in place of pictures."""

import inspect
import json

import pytest
import torch
from support.torch_models import tensor
from support.torch_runtime import ENCODER, IDS

from psa_jax.errors import PSAError
from psa_jax.profiles.schema import UserProfile
from psa_jax.torch import load_adapter
from psa_jax.torch.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

PROFILE = {"age": 9, "gender": "female"}
TEXT = tensor(1, 9, 32, seed=2)
CONDITIONING = [[TEXT, {"pooled_output": torch.ones(1, 4)}]]


@pytest.fixture
def node():
    (kind,) = NODE_CLASS_MAPPINGS.values()
    return kind()


def test_it_keeps_the_contract(node):
    assert NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()
    inputs = node.INPUT_TYPES()
    method = getattr(node, node.FUNCTION)
    assert inspect.signature(method).parameters.keys() == {**inputs["required"], **inputs["optional"]}.keys()
    assert node.RETURN_TYPES == ("CONDITIONING",) and isinstance(node.CATEGORY, str)


@pytest.mark.parametrize("kind", ["prompt", "edit", "gates"])
def test_it_is_the_adapter_of_the_runtime(node, files, table, tmp_path, kind):
    (output,) = node.apply(CONDITIONING, str(files[kind]), 0.5, profile=json.dumps(PROFILE))
    ((states, more),) = output
    adapter, _ = load_adapter(files[kind])
    user = torch.from_numpy(ENCODER.encode([UserProfile.from_mapping(PROFILE)]))
    torch.testing.assert_close(states, adapter(TEXT, user, torch.tensor([0.5])))
    assert (states - TEXT).abs().max() > 0.01
    assert more.keys() == {"pooled_output"} and torch.equal(CONDITIONING[0][0], tensor(1, 9, 32, seed=2))

    table.save(tmp_path / "table.safetensors")
    known = {"user": IDS[0], "table": str(tmp_path / "table.safetensors")}
    (((by_id, _),),) = node.apply(CONDITIONING, str(files[kind]), 0.5, **known)
    torch.testing.assert_close(by_id, adapter(TEXT, torch.from_numpy(table.lookup(IDS[:1])), torch.tensor([0.5])))
    (((unchanged, _),),) = node.apply(CONDITIONING, str(files[kind]), 0.0, **known)
    assert torch.equal(unchanged, TEXT)


def test_a_file_that_was_written_again_is_read_again(node, files, tmp_path):
    path, profile = tmp_path / "a.safetensors", json.dumps(PROFILE)
    drawn = []
    for kind in ("edit", "prompt"):
        path.write_bytes(files[kind].read_bytes())
        (((states, _),),) = node.apply(CONDITIONING, str(path), 1.0, profile=profile)
        (((wanted, _),),) = node.apply(CONDITIONING, str(files[kind]), 1.0, profile=profile)
        assert torch.equal(states, wanted)
        drawn.append(states)
    assert not torch.equal(*drawn)


def test_what_it_refuses(node, files):
    with pytest.raises(PSAError, match="the text kind acts inside the UNet"):
        node.apply(CONDITIONING, str(files["text"]), 1.0, profile=json.dumps(PROFILE))
    with pytest.raises(PSAError, match="needs a user"):
        node.apply(CONDITIONING, str(files["edit"]), 1.0)
    with pytest.raises(PSAError, match="width 30; the adapter is for a base model of 32"):
        node.apply([[tensor(1, 9, 30), {}]], str(files["edit"]), 1.0, profile=json.dumps(PROFILE))
