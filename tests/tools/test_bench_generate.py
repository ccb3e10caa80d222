"""What `psa-jax bench generate` measures, on a small UNet: the numbers are of the machine, the keys are not."""

import json
import os

from support.torch_models import UNETS

from psa_jax.cli import main
from psa_jax.models.config import UNetConfig
from psa_jax.tools import bench_generate
from psa_jax.tools.bench_generate import ratios


def test_every_way_is_measured():
    result = ratios(UNetConfig.from_json(UNETS["mid_only"]), 4, 2)
    kinds = {"base_seconds", "published", "text", "concept", "prompt", "rewrite", "edit"}
    assert result["jax"].keys() == kinds
    assert result["torch"].keys() == kinds | {"original"}
    assert (result["jax_ratio"], result["torch_ratio"]) == (result["jax"]["text"], result["torch"]["text"])
    assert result["original_ratio"] == result["torch"]["original"]
    assert result["quartiles"]["torch"].keys() == result["torch"].keys() - {"base_seconds"}
    low, high = result["quartiles"]["jax"]["text"]
    assert low <= result["jax_ratio"] <= high
    assert all(value > 0 for way in ("jax", "torch") for value in result[way].values())


def test_the_ways_take_turns(monkeypatch, capsys):
    """The clock stands still but for what a way takes: one disturbed turn of eight moves nothing."""
    calls, now = [], [0.0]

    def way(name, seconds):
        def step():
            calls.append(name)
            now[0] += 60.0 if len(calls) == 10 else seconds

        return step

    monkeypatch.setattr(bench_generate.time, "perf_counter", lambda: now[0])
    medians, quartiles = bench_generate._measured({"base": way("b", 2.0), "text": way("t", 2.5)}, 8)
    assert "".join(calls) == "bt" + "bttb" * 4  # a warm-up, and then each is first in every other turn
    assert medians == {"base_seconds": 2.0, "text": 1.25} and quartiles == {"text": [1.25, 1.25]}
    assert "measuring base, text: 8/8 turns" in capsys.readouterr().err


def test_bench_generate_says_what_comes(monkeypatch, capsys):
    monkeypatch.setattr(bench_generate, "ratios", lambda config, side, steps: {"jax_ratio": 1.0})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert main(["bench", "generate", "--steps=3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["jax_ratio"], result["steps"], result["load"], result["busy"]) == (1.0, 3, [0.0, 0.0], False)
    assert "3 turns each, after compiling" in err


def test_a_size_that_no_unet_takes(capsys):
    assert main(["bench", "generate", "--size=100"]) == 1
    assert "multiple of 64" in capsys.readouterr().err
