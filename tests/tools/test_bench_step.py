"""Both ways of `psa-jax bench step` train: the first loss is ln 2, and later ones are not. Times are not tested."""

import json
import math
from pathlib import Path

import pytest
import torch

from psa_jax.cli import main
from psa_jax.tools import bench_step
from psa_jax.tools.configs import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(("way", "dtype"), [("ours", "float32"), ("torch", "float32"), ("torch", "bfloat16")])
def test_the_step_is_one_of_dpo(sd1, way, dtype):
    config = read_config(f"{CONFIGS}/tiny.py", [("optimizer.warmup_steps", "0"), ("adapter.tokens", "2")])
    spec = {name: config[name].to_dict() for name in ("adapter", "objective", "optimizer")}
    spec |= {"model": str(sd1[0]), "dtype": dtype, "remat": "none", "draws": 0, "pairs": 2, "resolution": None}
    step = {"ours": bench_step._our_step, "torch": bench_step._torch_step}[way](spec)
    with torch.enable_grad():  # torch_models turns it off
        assert step() == pytest.approx(math.log(2), abs=1e-5)
        assert abs(step() - math.log(2)) > 1e-4


def test_a_configuration_that_leaves_the_model_open(capsys):
    assert main(["bench", "step", f"--config={CONFIGS}/sd15.py"]) == 1
    assert "--model=PATH" in capsys.readouterr().err


def test_two_devices_are_not_compared(capsys, monkeypatch):
    found = {"seconds": 1.0, "peak_bytes": 1, "first_loss": 0.7}
    devices = {"ours": "cpu", "torch": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(bench_step, "_measure", lambda way, spec: found | {"device": devices[way]})
    assert main(["bench", "step", f"--config={CONFIGS}/tiny.py", "--against=torch"]) == 1
    assert "JAX ran on cpu and torch on NVIDIA H100" in capsys.readouterr().err
    devices["torch"] = "cpu"
    assert main(["bench", "step", f"--config={CONFIGS}/tiny.py", "--against=torch"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio_time"] == 1.0
