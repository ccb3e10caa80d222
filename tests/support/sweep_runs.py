"""Stands in for `psa-jax train` in sweeps: it leaves the files that a training leaves, and does as a plan says."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from psa_jax.interop.adapter_file import FORMAT
from psa_jax.sweeps import launchers

# argv: folder of this stand-in, then the words after psa-jax. Imports nothing that takes time.
SCRIPT = """
import json, pathlib, shutil, signal, sys, time
own, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
with (own / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
options = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
if words[0] == "sweep":
    sys.exit(0)
folder = pathlib.Path(options["workdir"])
config = json.loads((own / "config.json").read_text())
for key, text in options.items():
    if key.startswith("config."):
        *groups, leaf = key.split(".")[1:]
        holder = config
        for group in groups:
            holder = holder[group]
        kind = type(holder[leaf])
        holder[leaf] = kind(text) if kind in (int, float) else text
(folder / "config.json").write_text(json.dumps(config))
attempts = folder / "attempts"
attempt = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (attempt + 1))
plan = json.loads((own / "plan.json").read_text()).get(folder.name, ["0"])
do = plan[min(attempt, len(plan) - 1)]
if do == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
if do == "75":
    (folder / "checkpoints" / str(attempt + 1)).mkdir(parents=True)
if do == "nan":
    (folder / "nonfinite_2.json").write_text("{}")
    print("psa-jax: error: step 2: loss is nan; lower the learning rate", file=sys.stderr)
    sys.exit(1)
if do == "1":
    print("psa-jax: error: the disk is full", file=sys.stderr)
if do == "0":
    loss = config["objective"]["beta"] / 60.0 + 0.1 * config["seed"]
    rows = [{"step": step, "loss": loss + 4 - step, "accuracy": 1 - loss / 10} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    shutil.copy(own / "adapter.safetensors", folder / "psa_adapter.safetensors")
sys.exit(0 if do == "again" else int(do))
"""


class StandIn:
    """A command in place of `psa-jax`.

    Args:
      folder: for its files.
      config: that the trainings start from, as JSON.
      plan: point → what each attempt does: an exit code, `nan` or `wait`; the last one is repeated.
    """

    def __init__(self, folder: Path, config: Mapping, plan: Mapping[str, Sequence[str]]):
        self.folder = folder
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPT)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "calls.jsonl").touch()
        self.plan(plan)
        about = json.dumps({"format": FORMAT, "steps": config["steps"]})
        save_file({"x": np.zeros(1, np.float32)}, folder / "adapter.safetensors", {"psa": about})

    def plan(self, plan: Mapping[str, Sequence[str]]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    @property
    def words(self) -> tuple[str, ...]:
        return sys.executable, str(self.folder / "train.py"), str(self.folder)

    @property
    def calls(self) -> list[list[str]]:
        """Words of each call so far, and forgets them."""
        path = self.folder / "calls.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("")
        return found

    def use(self, monkeypatch) -> None:
        monkeypatch.setattr(launchers, "HERE", self.words)
