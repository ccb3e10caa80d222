"""LoRA files in every format of diffusers, merged as W + s·(alpha/r)·B·A; nothing of a file is left unused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, save_stable_diffusion
from psa_jax.interop.lora import FILE_NAME, merge_lora
from psa_jax.interop.weights import open_tensors

RANK = 3
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# Format -> (name of the pair's first matrix, of its second), with the module and the projection in between.
FORMATS = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "no prefix": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "down and up": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "processor": ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight"),
    "processor, no prefix": ("{}_lora.down.weight", "{}_lora.up.weight"),
}


def in_format(name: str, module: str) -> tuple[str, str]:
    if "processor" in name:
        head, _, projection = module.removesuffix(".0").rpartition(".")
        module = f"{head}.processor.{projection}"
    return tuple(part.format(module) for part in FORMATS[name])


@pytest.fixture(scope="module")
def pairs(sd1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random (A, B) for every projection of every attention, and for one convolution."""
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name, weight in sd1[1].unet.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            pairs[module] = (down, torch.randn(weight.shape[0], RANK, generator=generator))
    assert len(pairs) == 4 * 2 * 4  # projections, attentions a block, blocks
    return pairs


def tensors_of(pairs, name: str) -> dict[str, torch.Tensor]:
    return {key: t for module, pair in pairs.items() for key, t in zip(in_format(name, module), pair, strict=True)}


def merged(unet, pairs, factor) -> dict[str, torch.Tensor]:
    weights = dict(unet.state_dict())
    for module, (down, up) in pairs.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + factor(module) * (up @ down)
    return weights


def assert_merged(folder: Path, path: Path, scale: float, expected: dict[str, torch.Tensor]) -> None:
    got = merge_lora(open_tensors(folder / UNET_FILE), path, scale).by_name
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(got[name].all(), weight.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, sd1, pairs, tmp_path):
    save_file(tensors_of(pairs, name), tmp_path / "lora.safetensors")
    assert_merged(sd1[0], tmp_path / "lora.safetensors", 0.7, merged(sd1[1].unet, pairs, lambda _: 0.7))
    if name != "no prefix" and name != "peft":  # the names are those that diffusers reads
        theirs = {k.removeprefix("unet."): t for k, t in tensors_of(pairs, name).items()}
        assert convert_unet_state_dict_to_peft(theirs).keys() == tensors_of(pairs, "no prefix").keys()


def test_alpha_as_tensors_and_as_metadata_of_diffusers(sd1, pairs, tmp_path):
    alphas = {module: 0.5 * i for i, module in enumerate(pairs)}
    tensors = tensors_of(pairs, "peft") | {f"unet.{m}.alpha": torch.tensor(a) for m, a in alphas.items()}
    save_file(tensors, tmp_path / "alpha.safetensors")
    expected = merged(sd1[1].unet, pairs, lambda m: 2.0 * alphas[m] / RANK)
    assert_merged(sd1[0], tmp_path / "alpha.safetensors", 2.0, expected)

    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for rslora, root in ((False, RANK), (True, RANK**0.5)):
        about = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {special: 9}, "use_rslora": rslora, "use_dora": False}
        layers = {k.removeprefix("unet."): t for k, t in tensors_of(pairs, "peft").items()}
        StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=about)
        assert json.loads(metadata_of(tmp_path / FILE_NAME))["unet.lora_alpha"] == 6
        expected = merged(sd1[1].unet, pairs, lambda m, root=root: (9 if m == special else 6) / root)
        assert_merged(sd1[0], tmp_path, 1.0, expected)


def metadata_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["lora_adapter_metadata"]


def test_convolutions(sd1, tmp_path):
    weights = sd1[1].unet.state_dict()
    name = "down_blocks.0.resnets.0.conv1"
    out, inner, *window = weights[f"{name}.weight"].shape
    down, up = torch.randn(RANK, inner, *window), torch.randn(out, RANK, 1, 1)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    delta = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)  # the update of two convolutions
    expected = weights | {f"{name}.weight": weights[f"{name}.weight"] + delta}
    assert_merged(sd1[0], tmp_path / "lora.safetensors", 1.0, expected)


def test_merged_model_is_what_diffusers_fuses(sd1, pairs, tmp_path):
    layers = {k.removeprefix("unet."): t for k, t in tensors_of(pairs, "peft").items()}
    about = {"r": RANK, "lora_alpha": 6, "target_modules": list(PROJECTIONS)}
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=about)
    pipeline = StableDiffusionPipeline.from_pretrained(sd1[0], local_files_only=True)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(lora_scale=0.3)
    pipeline.unload_lora_weights()
    assert_merged(sd1[0], tmp_path, 0.3, pipeline.unet.state_dict())


def test_loading_a_pipeline_merges_into_stacked_blocks(sdxl, tmp_path):
    name = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    weights = sdxl[1].unet.state_dict()
    out, inner = weights[f"{name}.weight"].shape
    down, up = torch.randn(1, inner), torch.randn(out, 1)
    save_file({f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}, tmp_path / FILE_NAME)
    model = load_stable_diffusion(sdxl[0], lora=tmp_path, lora_scale=-0.5)
    save_stable_diffusion(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / UNET_FILE)
    changed = {key for key, value in weights.items() if not torch.equal(written[key], value)}
    assert changed == {f"{name}.weight"}
    torch.testing.assert_close(written[f"{name}.weight"], weights[f"{name}.weight"] - 0.5 * up @ down)


MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"unet.{MODULE}.lora_A.weight"), f"{MODULE} has no lora_A tensor"),
        (lambda t: t.pop(f"unet.{MODULE}.lora_B.weight"), f"{MODULE} has no lora_B tensor"),
        (lambda t: t.update({f"unet.{MODULE}.alpha": torch.tensor(1.0)}), "alpha is ambiguous"),
        (
            lambda t: t.update({f"unet.{MODULE}.lora_magnitude_vector": torch.ones(3)}),
            "lora_magnitude_vector is of DoRA",
        ),
        (lambda t: t.update({f"unet.{MODULE}.lora.down.weight": torch.ones(3, 32)}), "are the same parameter"),
        (lambda t: t.update({f"unet.{MODULE}.lora_B.weight": torch.ones(32, 2)}), "do not multiply"),
        (lambda t: t.update({f"unet.{MODULE}.lora_B.weight": torch.ones(9, RANK)}), "is for another base model"),
        (
            lambda t: [t.update({f"unet.other.lora_{x}.weight": torch.ones(1, 1)}) for x in "AB"],
            "other is no layer of the unet here",
        ),
        (
            lambda t: t.update({"lora_unet_mid_block_to_q.alpha": torch.ones(1)}),
            "mid_block_to_q is no layer of the unet",
        ),
        (lambda t: t.update({"text_encoder.layers.0.lora_A.weight": torch.ones(1)}), "changes text_encoder, and"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_what_does_not_belong_is_refused(change, words, sd1, pairs, tmp_path):
    tensors = tensors_of(pairs, "peft")
    change(tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(PSAError) as caught:
        merge_lora(open_tensors(sd1[0] / UNET_FILE), tmp_path / "lora.safetensors")
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_and_unsupported_settings_are_refused(sd1, pairs, tmp_path):
    unet = open_tensors(sd1[0] / UNET_FILE)
    with pytest.raises(PSAError, match="lora.bin is a pickle"):
        merge_lora(unet, tmp_path / "lora.bin")
    with pytest.raises(PSAError, match="weights not found"):
        merge_lora(unet, tmp_path)
    path = tmp_path / "lora.safetensors"
    for about, words in (
        ('{"unet.use_dora": true}', "use_dora = True is not supported"),
        ("[", "lora_adapter_metadata: not valid JSON"),
    ):
        save_file(tensors_of(pairs, "peft"), path, {"lora_adapter_metadata": about})
        with pytest.raises(PSAError, match=words):
            merge_lora(unet, path)
