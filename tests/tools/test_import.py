"""psa-jax import as a user calls it."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from psa_jax.cli import main
from psa_jax.interop.adapter_file import read_metadata
from psa_jax.interop.single_file import CONFIGS
from psa_jax.models.config import UNetConfig

SDXL = CONFIGS["StableDiffusionXLPipeline"]["unet"]


def model_folder(folder, config: UNetConfig):
    """A model's configuration alone."""
    (folder / "unet").mkdir(parents=True)
    values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    (folder / "unet" / "config.json").write_text(json.dumps(values))
    return folder


def upstream_state(config: UNetConfig, user_dim: int, dtype=torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights under the torch original's names; modules' state dicts, as it saves them."""
    cross = config.cross_attention_dim
    layers = torch.nn.ModuleList(
        torch.nn.ModuleDict(
            {f"to_{p}_user": torch.nn.Sequential(torch.nn.Linear(cross, width, bias=False)) for p in "kv"}
        )
        for width, _ in config.cross_attentions
    )
    projection = torch.nn.ModuleDict({"proj": torch.nn.Linear(user_dim, cross), "norm": torch.nn.LayerNorm(cross)})
    return {"psa_adapter": layers.to(dtype).state_dict(), "user_proj": projection.to(dtype).state_dict()}


def round_trip(tmp_path, config: UNetConfig, parameters: int) -> None:
    """.bin and safetensors of the original -> import -> export -> torch.load: the same bytes."""
    state = upstream_state(config, 3584)
    assert sum(tensor.numel() for group in state.values() for tensor in group.values()) == parameters
    torch.save(state, tmp_path / "psa_adapter.bin")
    flat = {f"{group}.{name}": tensor for group, tensors in state.items() for name, tensor in tensors.items()}
    safetensors.torch.save_file(flat, tmp_path / "upstream.safetensors")
    model = model_folder(tmp_path / "model", config)
    for name in ("psa_adapter.bin", "upstream.safetensors"):
        native, out = tmp_path / f"{name}.native.safetensors", tmp_path / f"{name}.again.bin"
        assert main(["import", str(tmp_path / name), f"--model={model}", f"--out={native}"]) == 0
        assert main(["export", str(native), "--format=upstream", f"--out={out}"]) == 0
        again = torch.load(out, weights_only=True, mmap=True)
        assert {g: list(t) for g, t in again.items()} == {g: list(again[g]) for g in state}
        for group, tensors in state.items():
            assert set(again[group]) == set(tensors)
            for key, tensor in tensors.items():
                assert again[group][key].numpy().tobytes() == tensor.numpy().tobytes(), key
        native.unlink()
        out.unlink()


def test_upstream_to_upstream_is_byte_equal_at_the_size_of_sd15(tmp_path):
    round_trip(tmp_path, UNetConfig(), 21_924_096)


@pytest.mark.slow
def test_upstream_to_upstream_is_byte_equal_at_the_size_of_sdxl(tmp_path):
    round_trip(tmp_path, SDXL, 348_133_376)


def test_import_says_what_is_known_of_an_upstream_adapter(tmp_path):
    config = UNetConfig(block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=24)
    torch.save(upstream_state(config, 7, torch.float16), tmp_path / "psa_adapter.bin")
    model = model_folder(tmp_path / "model", config)
    out = tmp_path / "a.safetensors"
    assert main(["import", str(tmp_path / "psa_adapter.bin"), f"--model={model}", f"--out={out}"]) == 0
    about = read_metadata(out)
    assert about["layers"] == [[32, 8]] * 16
    assert {k: about[k] for k in ("family", "kind", "tokens", "user_dim", "cross_dim")} == {
        "family": "sd1", "kind": "published", "tokens": 1, "user_dim": 7, "cross_dim": 24,
    }  # fmt: skip
    assert {t.dtype for t in safetensors.torch.load_file(out).values()} == {torch.float32}


def test_what_cannot_be_imported(run_folder, tmp_path, refused):
    config = UNetConfig(block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=24)
    torch.save(upstream_state(config, 7), tmp_path / "a.bin")
    words = (f"--out={tmp_path / 'out.safetensors'}",)
    assert "width of 32" in refused("import", tmp_path / "a.bin", f"--model={run_folder[0]}", *words)
    model = model_folder(tmp_path / "model", dataclasses.replace(config, layers_per_block=1))
    assert "another base model" in refused("import", tmp_path / "a.bin", f"--model={model}", *words)
    state = upstream_state(config, 7)
    state["psa_adapter"]["3.to_k_user.0.weight"][0, 0] = np.inf
    torch.save(state, tmp_path / "b.bin")
    model = model_folder(tmp_path / "right", config)
    error = refused("import", tmp_path / "b.bin", f"--model={model}", *words)
    assert "psa_adapter.3.to_k_user.0.weight has values that are not finite" in error
    (tmp_path / "c.bin").write_bytes((tmp_path / "b.bin").read_bytes()[:3000])
    assert "not a whole file" in refused("import", tmp_path / "c.bin", f"--model={model}", *words)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pickle_of_any_name_is_brought_in_as_the_error_says(run_folder, tmp_path, refused):
    model, folder = run_folder
    assert main(["export", str(folder), "--format=upstream", f"--out={tmp_path / 'a.bin'}"]) == 0
    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        pickle, made = (tmp_path / "a.bin").rename(tmp_path / f"a{suffix}"), tmp_path / f"made{suffix}.safetensors"
        command = f"psa-jax import {pickle} --model=DIR --out=FILE"
        assert command in refused("export", pickle, f"--out={tmp_path / 'x'}")
        assert main(command.replace("DIR", str(model)).replace("FILE", str(made)).split()[1:]) == 0
        assert main(["export", str(made), f"--out={tmp_path / ('out' + suffix[1:])}"]) == 0
        pickle.rename(tmp_path / "a.bin")
    for words in (["export", folder], ["import", folder / "psa_adapter.safetensors", f"--model={model}"]):
        assert "name it .safetensors" in refused(*words, f"--out={tmp_path / 'native.bin'}")
    assert not (tmp_path / "native.bin").exists()


def test_what_is_no_adapter(run_folder, tmp_path, refused):
    model, folder = run_folder
    out, table = f"--out={tmp_path / 'x.safetensors'}", folder / "table.safetensors"
    for words in (["export", table], ["import", table, f"--model={model}"]):
        assert "an embedding table and no adapter" in refused(*words, out)
    error = refused("import", folder, f"--model={model}", out)
    assert f"a folder; give the file in it, such as {folder / 'psa_adapter.safetensors'}" in error
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    error = refused("import", tmp_path / "a.safetensors", f"--model={model}", out)
    assert "user_proj.proj.weight is missing, so it is no adapter of PSA" in error
