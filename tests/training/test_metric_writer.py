"""What a run writes about itself: rows without gaps, the alarm, values that are not there, wandb."""

import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.training.metric_writer import MetricsWriter, grouped, require_finite


def metrics(gap: float = -1.0, **more: float):
    return {name: jnp.float32(value) for name, value in {"loss": 0.5, "winner_gap": gap, **more}.items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder: Path, gaps: dict[int, float], start: int = 0, **options) -> None:
    with MetricsWriter(folder, start, **options) as writer:
        for step, gap in gaps.items():
            writer.log(step, metrics(gap))


def test_a_step_late_and_none_lost(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        assert writer.log(1, metrics(), pairs_per_second=2.0) is None
        assert rows(tmp_path) == []
        assert writer.log(2, metrics(sum_accuracy_banned=0.0, pairs_banned=0.0)) == {
            "loss": 0.5,
            "winner_gap": -1.0,
            "pairs_per_second": 2.0,
        }
        writer.sync()
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert "accuracy_banned" not in rows(tmp_path)[1]  # a bucket without pairs


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "loss/loss"),
        ("winner_gap", "preference/winner_gap"),
        ("accuracy_banned", "preference/accuracy_banned"),
        ("held_out_accuracy", "held_out/accuracy"),
        ("swap_learnt_banned0", "swap/swap_learnt_banned0"),
        ("pairs_per_second", "speed/pairs_per_second"),
        ("pairs_banned", "pairs/pairs_banned"),
        ("learning_rate", "optimizer/learning_rate"),
        ("examples", "progress/examples"),
        ("alarm_winner_worse", "alarms/alarm_winner_worse"),
    ],
)
def test_tensorboard_has_them_in_groups(name: str, group: str):
    assert grouped(name) == group


def test_a_resumed_run_writes_its_rows_again(tmp_path: Path):
    write(tmp_path, dict.fromkeys(range(1, 6), -1.0))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while it wrote
    write(tmp_path, dict.fromkeys(range(4, 7), -2.0), start=3)
    assert [(row["step"], row["winner_gap"]) for row in rows(tmp_path)] == [
        (1, -1), (2, -1), (3, -1), (4, -2), (5, -2), (6, -2)
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


GAPS = {2: -0.2, 4: 0.1, 6: 0.3, 8: -0.1, 10: 0.1, 12: -0.2}  # means of windows of 4: −0.05, 0.1, −0.05


@pytest.mark.parametrize("stopped", [None, 4, 6, 10])
def test_the_alarm_of_a_winner_that_gets_worse(tmp_path: Path, capsys, stopped: int | None):
    """Once a window; a run that was stopped inside one raises the same."""
    if stopped is not None:
        write(tmp_path, {step: gap for step, gap in GAPS.items() if step <= stopped}, alarm_window=4)
    start = stopped or 0
    write(tmp_path, {step: gap for step, gap in GAPS.items() if step > start}, start=start, alarm_window=4)
    alarms = {row["step"]: row["alarm_winner_worse"] for row in rows(tmp_path) if "alarm_winner_worse" in row}
    assert alarms == {4: 0.0, 8: 1.0, 12: 0.0}
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "alarm" in line]
    assert (
        said.startswith("psa-jax: alarm winner_worse at step 8: ") and "pw - rw = 0.1 on average over 4 steps" in said
    )


def test_what_is_not_finite(tmp_path: Path):
    require_finite(3, metrics(gradient_norm=1.0, accuracy_banned=float("nan")), np.arange(2), tmp_path)
    with pytest.raises(PSAError, match=r"step 3: gradient_norm is inf; the rows .*nonfinite_3\.json.*lower"):
        require_finite(3, metrics(gradient_norm=float("inf")), np.int32([7, 5]), tmp_path)
    assert json.loads((tmp_path / "nonfinite_3.json").read_text()) == {"step": 3, "rows": [7, 5]}


class _Run:
    def __init__(self):
        self.logged, self.ended = [], None

    def log(self, row, step):
        self.logged.append((step, row["loss"]))

    def finish(self, exit_code):
        self.ended = exit_code


def test_wandb(tmp_path: Path, monkeypatch):
    run, opened = _Run(), []
    module = types.ModuleType("wandb")
    module.util = types.SimpleNamespace(generate_id=lambda: "abc")
    module.init = lambda **options: opened.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for start in (0, 1):  # a resumed run goes on in the same place
        write(tmp_path, {start + 1: -1.0}, start=start, wandb={"seed": 0})
    assert run.logged == [(1, 0.5), (2, 0.5)] and run.ended == 0
    assert [options["id"] for options in opened] == ["abc", "abc"]
    assert opened[0]["config"] == {"seed": 0} and opened[0]["resume"] == "allow"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PSAError, match="wandb is asked for and not installed"):
        MetricsWriter(tmp_path, wandb={})


def test_torch_stays_out(tmp_path, monkeypatch):
    """tensorboardX would import it, where it is installed."""
    for name in [name for name in sys.modules if name == "torch" or name.split(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    with MetricsWriter(tmp_path):
        assert "tensorboardX" in sys.modules and "torch" not in sys.modules
