"""Training at the real size of SD1.5 on a CPU: random weights, 256 px, one pair a step, two steps."""

import json
import math
import resource
import time

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from support.torch_models import join_pipeline, small_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.interop.diffusers import load_stable_diffusion, parameter_count
from psa_jax.mini.prepare import prepare
from psa_jax.tools.configs import read_config
from psa_jax.training.loop import train


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A folder of SD1.5's shapes with random weights, written by diffusers."""
    folder = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    tokenizer = small_tokenizer(folder / "tokenizer_source")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    join_pipeline(
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        ),
        CLIPTextModel(text),
        tokenizer,
    ).save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_steps(sd15, tmp_path, pytestconfig):
    model = load_stable_diffusion(sd15 / "model")
    assert parameter_count(model.unet) == 859_520_964
    prepare(tmp_path / "data", model, users=1, seed=0, resolution=256, family="sd1", splits=("train",), batch_size=2)
    del model
    config = read_config(
        f"{pytestconfig.rootpath / 'configs' / 'tiny.py'}:dpo-smoke",
        [
            ("model", str(sd15 / "model")),
            ("data.shards", str(tmp_path / "data" / "shards")),
            ("data.table", str(tmp_path / "data" / "table.safetensors")),
            ("data.mini.users", "0"),
            ("data.balance", "none"),
            ("steps", "2"),
            ("batch_size", "1"),
            ("log_every", "1"),
        ],
    )
    start = time.perf_counter()
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nSD1.5, 256 px, 1 pair: losses {[row['loss'] for row in rows]}, {time.perf_counter() - start:.0f} s, "
          f"peak memory {peak:.1f} GiB (data and model making included)")  # fmt: skip
    assert abs(rows[0]["loss"] - math.log(2)) <= 1e-5
    assert rows[1]["loss"] != rows[0]["loss"]
    assert math.isfinite(rows[1]["loss"])
    assert (tmp_path / "run" / ADAPTER_FILE).is_file()
