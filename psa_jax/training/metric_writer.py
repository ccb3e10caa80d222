"""Writes the metrics of a run: `metrics.jsonl`, TensorBoard and wandb. Values are read one step late."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.json_input import parse_json
from psa_jax.preference.metrics import part_means
from psa_jax.progress import print_on_main
from psa_jax.training.distributed import in_global_order, is_main_process
from psa_jax.training.state import Metrics

Row = dict[str, int | float]

# Where one of these is not finite, the state that the step leaves behind is not, either.
_FINITE = ("loss", "gradient_norm", "update_norm")


class MetricsWriter:
    """Appends to the metrics of a run; in a group only process 0 writes.

    Args:
      step: rows after it are dropped: a resumed run writes them again.
      alarm_window: steps over which a mean of pw − rw above 0 raises the alarm `winner_worse`; 0 never does.
      wandb: the run's configuration, to log to Weights & Biases, too.
    """

    def __init__(self, folder: Path, step: int = 0, *, alarm_window: int = 0, wandb: dict[str, Any] | None = None):
        self.path = folder / "metrics.jsonl"
        self._pending: tuple[int, Metrics, dict[str, float]] | None = None
        self._window, self._gaps = alarm_window, []
        self._file, self._board, self._wandb = None, None, None
        if not is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for row in _keep_rows(self.path, step):
            self._collect(row)
        if wandb is not None:
            self._wandb = _open_wandb(folder, wandb)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_board(folder / "tensorboard", purge_step=step + 1)

    def log(self, step: int, metrics: Metrics, **measured: float) -> Row | None:
        """Queues a step's metrics and writes those queued before, which the device has finished by now."""
        written = self.flush()
        self._pending = (step, metrics, measured)
        return written

    def flush(self) -> Row | None:
        """Writes the queued metrics; a part of the batch without pairs has none."""
        if self._pending is None or self._file is None:
            return None
        step, metrics, measured = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} | measured
        row = {"step": step} | part_means(values)
        alarm = self._collect(row)
        if alarm is not None:
            row["alarm_winner_worse"] = float(alarm > 0)
            if alarm > 0:
                print_on_main(
                    f"alarm winner_worse at step {step}: the winners' error exceeds the base model's, "
                    f"pw - rw = {alarm:.3g} on average over {self._window} steps; raise objective.sft_weight or "
                    "lower objective.beta"
                )
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        del row["step"]
        for name, value in row.items():
            self._board.add_scalar(grouped(name), value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)
        return row

    def sync(self) -> None:
        """Writes the queued metrics down to the disk: a checkpoint of this step must not outlive its rows."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _collect(self, row: Row) -> float | None:
        """The mean of pw − rw over the rows since the last window, where this row completes one."""
        if not self._window or "winner_gap" not in row:
            return None
        window, step = self._window, int(row["step"])
        self._gaps = [(at, gap) for at, gap in self._gaps if (at - 1) // window == (step - 1) // window]
        self._gaps.append((step, row["winner_gap"]))
        # Rows alone decide, so that a resumed run raises the same alarms.
        return sum(gap for _, gap in self._gaps) / len(self._gaps) if step % window == 0 else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Writes the queued metrics unless the run failed; closes the files in any case."""
        try:
            if kind is None:
                self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


def _open_board(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer.

    tensorboardX imports torch where it is installed, for tensors that nothing here gives it: a second, and 180 MB.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=purge_step)


GROUPS = {
    "held_out_": "held_out",
    "swap_learnt": "swap",
    "pairs_per_second": "speed",
    "pairs_": "pairs",
    "alarm_": "alarms",
    **dict.fromkeys(("step_seconds", "data_wait_seconds", "mfu"), "speed"),
    **dict.fromkeys(("learning_rate", "gradient_norm", "update_norm"), "optimizer"),
    **dict.fromkeys(("examples", "time"), "progress"),
}
"""Beginning of a metric's name → its group in TensorBoard; the first that fits. All others are in `preference`."""


def grouped(name: str) -> str:
    """A metric's name in TensorBoard: its group, and what is left of the name, such as held_out/accuracy."""
    prefix = next((prefix for prefix in GROUPS if name.startswith(prefix)), None)
    if prefix is None:
        return f"loss/{name}" if name == "loss" else f"preference/{name}"
    return f"{GROUPS[prefix]}/{name.removeprefix(prefix) if prefix == 'held_out_' else name}"


def require_finite(step: int, metrics: Metrics, rows: np.ndarray, folder: Path) -> None:
    """Raises PSAError where loss, gradient or update of a step are not finite. All processes see the same values.

    Args:
      rows: of the split, as this process had them in the batch.
      folder: gets `nonfinite_<step>.json` with the rows of the whole batch.
    """
    found = jax.device_get({name: metrics[name] for name in _FINITE if name in metrics})
    bad = {name: float(value) for name, value in found.items() if not np.isfinite(value)}
    if not bad:
        return
    path, everyones = folder / f"nonfinite_{step}.json", in_global_order(rows)
    if is_main_process():
        path.write_text(json.dumps({"step": step, "rows": everyones}) + "\n", encoding="utf-8")
    words = ", ".join(f"{name} is {value}" for name, value in bad.items())
    raise PSAError(
        f"step {step}: {words}; the rows of its batch are in {path}, and the last checkpoint is from before it; "
        "lower the learning rate or β and run again"
    )


def _keep_rows(path: Path, step: int) -> list[Row]:
    """Cuts a file off after `step`, or where a killed process left half a row; whole or not at all."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = [row for row in (_row(path, line, text) for line, text in enumerate(lines, 1)) if row["step"] <= step]
    write(path, "".join(lines[: len(rows)]))
    return rows


def _row(path: Path, line: int, text: str) -> Row:
    row = parse_json(text, f"{path}, line {line}", constants=True)
    if type(row.get("step")) is not int:
        raise PSAError(f"{path}, line {line}: no whole number as step; remove the line, or use another --workdir")
    return row


def _open_wandb(folder: Path, config: dict[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise PSAError("wandb is asked for and not installed; pip install wandb, or --config.wandb=false") from error
    kept = folder / "wandb_id"
    if not kept.exists():
        kept.write_text(wandb.util.generate_id(), encoding="utf-8")
    return wandb.init(dir=str(folder), id=kept.read_text(encoding="utf-8"), resume="allow", config=config)
