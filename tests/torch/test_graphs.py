"""What compilers make of the runtime: no graph breaks, nothing compiled again, one graph to take away; and no JAX."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from support.torch_adapters import random_adapter
from support.torch_models import tensor
from support.torch_runtime import run_compiled

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_unet
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.torch import AdaptedUNet, UserAdapter, export_unet, load_adapter


def save(path: Path, folder: Path, kind: str, tokens: int = 4) -> Path:
    kind, pooled = kind.removesuffix("-pooled"), kind.endswith("-pooled")
    config = AdapterConfig.for_unet(load_unet(folder).config, user_dim=7, kind=kind, tokens=tokens, pooled=pooled)
    save_adapter(random_adapter(config), path, {})
    return path


@pytest.mark.parametrize("kind", ["text", pytest.param("concept", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_that_serves_every_user(sd1, tmp_path, kind):
    path = save(tmp_path / "a.safetensors", sd1[0], kind)
    then = "assert (expected[0] - expected[1]).abs().max() > 0.01\nprint('jax' in sys.modules, 'flax' in sys.modules)"
    said = run_compiled("StableDiffusionPipeline", sd1[0], path, then)
    assert said == "False False"


@pytest.mark.filterwarnings("ignore")  # of torch.export about its own future
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", "text"),
        pytest.param("sdxl", "concept", marks=pytest.mark.slow),
        pytest.param("sdxl", "edit-pooled", marks=pytest.mark.slow),
        pytest.param("sd1", "prompt", marks=pytest.mark.slow),
    ],
)
def test_torch_export(request, tmp_path, family, kind):
    folder, _ = request.getfixturevalue(family)
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    unet = pipeline.from_pretrained(folder, local_files_only=True).unet
    adapter, _ = load_adapter(save(tmp_path / "a.safetensors", folder, kind))
    width = unet.config.cross_attention_dim

    def inputs(seed: int) -> list[torch.Tensor]:
        parts = [tensor(2, 4, 8, 8, seed=seed), torch.tensor([900.0, 3.0]), tensor(2, 11, width, seed=seed + 1)]
        parts += [tensor(2, 7, seed=seed + 2), torch.tensor([0.37, 1.0])]
        added = [tensor(2, 24, seed=seed + 3), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)]
        return parts + (added if family == "sdxl" else [])

    processors = dict(unet.attn_processors)
    export_unet(unet, adapter, tmp_path / "unet.pt2", *inputs(0))
    assert dict(unet.attn_processors) == processors
    program = torch.export.load(tmp_path / "unet.pt2").module()
    again = inputs(9)
    expected = AdaptedUNet(unet, adapter)(*again)
    assert expected.std() > 0.05
    base = AdaptedUNet(unet, adapter)(*again[:4], torch.zeros(2), *again[5:])
    assert (base - expected).abs().max() > 0.01
    torch.testing.assert_close(program(*again), expected, rtol=0, atol=1e-4)


def test_export_to_another_name(tmp_path):
    config = AdapterConfig("text", 2, 3, 8, ((4, 2),))
    with pytest.raises(PSAError, match=r"name it \.pt2"):
        export_unet(torch.nn.Identity(), UserAdapter(config), tmp_path / "a.onnx")
