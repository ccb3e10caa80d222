"""From an adapter trained on the tiny model to a table: format × loader × largest difference of pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.torch_models import tensor

from psa_jax.cli import main
from psa_jax.diffusion.generate import Generator
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.interop.native import load_adapter
from psa_jax.mini.prepare import prepare
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools.configs import read_config
from psa_jax.torch import load_psa
from psa_jax.training.loop import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
PROMPT = ["crossed blades and a house in the snow"]
LATENTS = tensor(1, 4, 16, 16, seed=1)
TRAINED = {"published": 1, "text": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, load_stable_diffusion("tiny"), users=40, seed=3, resolution=64, splits=("train", "val"))
    return folder


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, data, tmp_path_factory):
    """A run's folder, its table, and JAX's own picture."""
    values = {
        "data.shards": data / "shards",
        "data.table": data / "table.safetensors",
        "data.mini.users": 0,
        "steps": 30,
        "adapter.kind": request.param,
        "adapter.tokens": TRAINED[request.param],
    }
    config = read_config(f"{CONFIG}:dpo-smoke", [(key, str(value)) for key, value in values.items()])
    folder = tmp_path_factory.mktemp(request.param)
    train(config, folder)
    return request.param, folder, data / "table.safetensors"


def in_jax(path: Path, user: np.ndarray) -> np.ndarray:
    model = load_stable_diffusion("tiny")
    adapter = load_adapter(path, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)
    generator = Generator(model, adapter, steps=20, guidance=7.5, unconditional="same", batch_size=1)
    drawn = generator.pixels(PROMPT, [0], user, latents=LATENTS.permute(0, 2, 3, 1).numpy())
    return np.clip(drawn * 0.5 + 0.5, 0.0, 1.0)


def in_diffusers(pipe, **options) -> np.ndarray:
    call = {"latents": LATENTS.clone(), "num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"}
    return pipe(PROMPT, **call, **options).images


def open_pipeline(folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(folder: Path, out: Path, format_: str, *words: str) -> Path:
    assert main(["export", str(folder), f"--format={format_}", f"--out={out}", *words]) == 0
    return out


def test_every_format_and_loader(trained, tmp_path):
    kind, folder, table = trained
    user = EmbeddingTable.load(table).lookup(["0000003"])
    reference = in_jax(folder / "psa_adapter.safetensors", user)
    base = in_diffusers(open_pipeline(TINY))
    print(f"\n{kind}, T = {TRAINED[kind]}; without the adapter: {np.abs(base - reference).max():.1e}")
    assert np.abs(base - reference).max() > 0.02, "the adapter must have learnt something"

    native = export(folder, tmp_path / "native", "native")
    whole = export(folder, tmp_path / "whole", "diffusers", "--model=tiny")

    def runtime(pipe, path):
        return in_diffusers(load_psa(pipe, path, table=table), user="0000003", unconditional="same")

    rows = [
        ("native", "JAX", in_jax(native / "psa_adapter.safetensors", user)),
        ("native", "psa_jax.torch", runtime(open_pipeline(TINY), native)),
        ("diffusers", "from_pretrained, psa_jax.torch", runtime(open_pipeline(whole), whole)),
    ]
    if kind == "published":
        upstream = export(folder, tmp_path / "upstream", "upstream") / "psa_adapter.bin"
        again = tmp_path / "again.safetensors"
        assert main(["import", str(upstream), "--model=tiny", f"--out={again}"]) == 0
        rows.append(("upstream", "psa-jax import, JAX", in_jax(again, user)))

        ip = export(folder, tmp_path / "ip", "ip-adapter")
        pipe = open_pipeline(TINY)
        pipe.load_ip_adapter(str(ip), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
        both = torch.from_numpy(np.concatenate([user, user]))[:, None]
        rows.append(("ip-adapter", "stock diffusers", in_diffusers(pipe, ip_adapter_image_embeds=[both])))

        words = ["--model=tiny", f"--table={table}", "--user=0000003"]
        baked = export(folder, tmp_path / "baked", "baked", *words)
        rows.append(("baked", "stock diffusers", in_diffusers(open_pipeline(baked))))
    for format_, loader, drawn in rows:
        error = np.abs(drawn - reference).max()
        print(f"{format_:10} | {loader:31} | {error:.1e}")
        assert error <= 1e-3, (format_, loader)
