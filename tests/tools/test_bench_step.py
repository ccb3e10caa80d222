"""Both ways of `psa-jax bench step` train: the first loss is ln 2, and later ones are not. Times are not tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psa_jax.cli import main
from psa_jax.tools import bench_step
from psa_jax.tools.configs import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = f"--config={CONFIGS}/tiny.py:dpo"


@pytest.mark.parametrize(("way", "dtype"), [("ours", "float32"), ("torch", "float32"), ("torch", "bfloat16")])
def test_the_step_is_one_of_dpo(sd1, way, dtype):
    changes = {"optimizer.warmup_steps": 0, "adapter.tokens": 2, "dtype": dtype, "model": sd1[0], "mesh.data": 1}
    config = read_config(f"{CONFIGS}/tiny.py:dpo", [(key, str(value)) for key, value in changes.items()])
    spec = {"config": json.loads(config.to_json()), "model": str(sd1[0]), "user_dim": 5, "cached_text": False}
    spec |= {"pairs": 2, "resolution": None}
    step = {"ours": bench_step._our_step, "torch": bench_step._torch_step}[way](spec)
    with torch.enable_grad():  # torch_models turns it off
        assert step() == pytest.approx(math.log(2), abs=1e-5)
        assert abs(step() - math.log(2)) > 1e-4


def test_the_torch_way_is_compared_with_preference_learning_only(capsys):
    assert main(["bench", "step", f"--config={CONFIGS}/tiny.py", "--against=torch"]) == 1
    assert "objective.loss is none; give --config=tiny:dpo" in capsys.readouterr().err


def test_a_configuration_that_leaves_the_model_open(capsys):
    assert main(["bench", "step", f"--config={CONFIGS}/sd15.py"]) == 1
    assert "--model=PATH" in capsys.readouterr().err


class Worker:
    """Stands for a process: says what it is asked, and takes a quarter of a second, or in torch a half."""

    calls: list[str] = []
    devices: dict[str, str] = {}

    def __init__(self, way, spec):
        self.way, self.device, self.first_loss = way, self.devices.get(way, "cpu"), 0.7

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.calls.append(f"{self.way} ends")

    def step(self):
        self.calls.append(self.way)
        return 0.5 if self.way == "torch" else 0.25

    def peak_bytes(self):
        return {"ours": 3, "torch": 4}[self.way]


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(Worker, "calls", [])
    monkeypatch.setattr(Worker, "devices", {})
    monkeypatch.setattr(bench_step, "_Worker", Worker)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    return Worker


def test_two_devices_are_not_compared(capsys, workers):
    workers.devices["torch"] = "NVIDIA H100 80GB HBM3"
    assert main(["bench", "step", TINY, "--against=torch"]) == 1
    assert "JAX ran on cpu and torch on NVIDIA H100" in capsys.readouterr().err
    assert workers.calls == ["torch ends", "ours ends"]


def test_the_two_take_turns(capsys, workers, tmp_path):
    words = [TINY, "--against=torch", "--steps=3", f"--json={tmp_path / 'step.json'}"]
    assert main(["bench", "step", *words]) == 0
    out, err = capsys.readouterr()
    assert workers.calls == ["ours", "torch"] * 3 + ["torch ends", "ours ends"]
    result = json.loads(out)
    assert result == json.loads((tmp_path / "step.json").read_text())
    expected = {
        "ours_seconds": 0.25,
        "torch_seconds_quartiles": [0.5, 0.5],
        "ratio_time": 2.0,
        "ratio_time_quartiles": [2.0, 2.0],
        "ratio_memory": 0.75,
        "load": [0.5, 0.5],
        "busy": False,
    }
    assert {name: result[name] for name in expected} == expected
    assert "ours: reading the model" in err and "measuring ours, torch: 3/3 turns" in err and "busy" not in err


def test_one_way_alone(capsys, workers):
    assert main(["bench", "step", TINY, "--steps=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert workers.calls == ["ours", "ours", "ours ends"] and "ratio_time" not in result


def test_a_process_of_its_own_measures(sd1, capsys, monkeypatch):
    """Both real processes, two turns; and one that ends says so on one line."""
    words = [TINY, f"--config.model={sd1[0]}", "--pairs=1", "--steps=2", "--against=torch"]
    assert main(["bench", "step", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    # Errors near 2 have the rounding 1.2e-7, which β / 2 + sft_weight = 66 make 1.6e-5; sums have some of them.
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert min(result["ours_seconds"], result["torch_seconds"], result["ours_peak_bytes"]) > 0
    monkeypatch.setattr(bench_step, "__name__", "psa_jax.tools.absent")
    assert main(["bench", "step", *words]) == 1
    assert "the process that measures 'ours' ended with code 1; see above" in capsys.readouterr().err


CHILD = "from psa_jax.tools.bench_step import _process_peak; print(_process_peak())"
PARENT = f"import subprocess, sys; held = b'x' * (300 << 20); subprocess.run([sys.executable, '-c', {CHILD!r}])"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts otherwise")
def test_what_the_parent_holds_is_not_measured():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < 200 << 20
