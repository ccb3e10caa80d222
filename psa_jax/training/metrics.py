"""Metrics of a run: `metrics.jsonl` for programs, TensorBoard for people. Values are read one step late."""

import json
import math
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from psa_jax.errors import PSAError
from psa_jax.training.step import Metrics


class MetricsWriter:
    """Appends to the metrics of a run.

    Args:
      step: rows after it are dropped: a resumed run writes them again.
    """

    def __init__(self, folder: Path, step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._pending: tuple[int, Metrics, dict[str, float]] | None = None
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [row for row in rows if json.loads(row)["step"] <= step]
        self.path.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Metrics, **measured: float) -> dict[str, float] | None:
        """Queues a step's metrics and writes those queued before, which the device has finished by now."""
        written = self.flush()
        self._pending = (step, metrics, measured)
        return written

    def flush(self) -> dict[str, float] | None:
        """Writes what is queued.

        Raises:
          PSAError: the loss is not finite.
        """
        if self._pending is None:
            return None
        step, metrics, measured = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()} | measured
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if not math.isfinite(row["loss"]):
            raise PSAError(f"step {step}: the loss is {row['loss']}; lower the learning rate or β and run again")
        return row

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Writes what is queued, unless the run failed; closes the files in any case."""
        try:
            if kind is None:
                self.flush()
        finally:
            self._file.close()
            self._board.close()
