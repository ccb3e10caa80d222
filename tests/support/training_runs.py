"""Runs of `psa-jax train` in processes of their own, on a small random model: started, killed, compared."""

import atexit
import json
import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
TIMES = {"step_seconds", "data_wait_seconds", "pairs_per_second", "time"}  # of the machine, not of the run

# Importing takes as long as such a run: one server imports, every run is a fork of it.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["psa_jax.tools.train", "transformers.models.clip.tokenization_clip"])


class Runs:
    """Starts runs with one set of settings.

    Args:
      folder: for compiled programs and output.
      model: folder of the base model.
      data: folder with shards and table.
      cheap: see `_cheap_losses`.
      pause: seconds that a step takes at least, for signals that travel slowly.
      slow_data: seconds that rendering SAGE-mini takes at least, twice what a process waits for others in a collective.
      environment: variables of the runs.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        data: Path,
        cheap: bool = False,
        pause: float = 0.0,
        slow_data: float = 0.0,
        environment: dict[str, str] | None = None,
        **settings,
    ):
        self.folder, self._how = folder, {"cheap": cheap, "pause": pause, "slow_data": slow_data}
        self._how["environment"] = environment or {}
        self._started: list[Run] = []
        self.settings = {
            "model": model,
            "data.shards": data / "shards",
            "data.table": data / "table.safetensors",
            "data.mini.users": 0,
            "log_every": 1,
            **settings,
        }

    def start(self, workdir: Path, *flags: str, devices: int = 1, file_size: int | None = None, **changed) -> "Run":
        """One process; `changed` are keys of the configuration with __ for a dot.

        Args:
          file_size: what no file may pass, in bytes.
        """
        settings = self.settings | {key.replace("__", "."): value for key, value in changed.items()}
        words = ["train", f"--config={CONFIG}:dpo-smoke", f"--workdir={workdir}", *flags]
        words += [f"--config.{key}={value}" for key, value in settings.items()]
        self._started.append(
            Run(workdir, words, {"jax_num_cpu_devices": devices, **self._cache()}, file_size, self._how)
        )
        return self._started[-1]

    def group(self, workdir: Path, processes: int, port: int, **changed) -> list["Run"]:
        """Processes that train together."""
        changed.setdefault("mesh__data", processes)
        group = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}"]
        return [self.start(workdir, *group, f"--process-id={index}", **changed) for index in range(processes)]

    def end(self) -> None:
        """Kills what still runs."""
        for run in self._started:
            run.process.kill()
            run.process.join()

    def _cache(self) -> dict[str, str | int]:
        return {
            "jax_compilation_cache_dir": str(self.folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }


class Run:
    """A process that trains."""

    def __init__(self, workdir: Path, words: list[str], flags: dict[str, Any], file_size: int | None, how: dict):
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self._metrics = workdir / "metrics.jsonl"
        self._before = self._metrics.stat().st_ino if self._metrics.exists() else None
        self._log = workdir / f"log_{len(list(workdir.glob('log_*')))}"
        self._log.touch()
        self.process: BaseProcess = _FORKS.Process(
            target=_main, args=(words, flags, str(self._log), file_size), kwargs=how
        )
        self.process.start()

    def code(self, timeout: float = 120) -> int:
        """Its exit code, when it has ended."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.output}"
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def error(self) -> str:
        """The line that says why it ended."""
        lines = [line for line in self.output.splitlines() if line.startswith("psa-jax: error: ")]
        assert len(lines) == 1, self.output
        return lines[0].removeprefix("psa-jax: error: ")

    def wait_for_rows(self, count: int, timeout: float = 120) -> None:
        """Until so many steps are in the metrics, which a run begins with a file of its own."""
        end, path = time.monotonic() + timeout, self._metrics
        while not path.exists() or path.stat().st_ino == self._before or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < end and self.process.is_alive(), self.output
            time.sleep(0.01)


def _main(
    words: list[str],
    flags: dict[str, Any],
    log: str,
    file_size: int | None,
    cheap: bool,
    pause: float,
    slow_data: float,
    environment: dict[str, str],
):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)  # a fork has that of the server it is a fork of
    if slow_data:
        os.environ["XLA_FLAGS"] += f" --xla_cpu_collective_timeout_seconds={int(slow_data / 2)}"
    import jax

    from psa_jax import cli
    from psa_jax.mini import prepare
    from psa_jax.training import gates, step, step_timer

    gates.STEPS = 20  # unoptimised, as programs are in tests, 600 take half a minute
    for name, value in flags.items():
        jax.config.update(name, value)
    if cheap:
        step.pair_losses = _cheap_losses
    if pause:
        finished = step_timer.StepClock.step
        step_timer.StepClock.step = lambda clock: (time.sleep(pause), finished(clock))
    if slow_data:
        made = prepare.prepare
        prepare.prepare = lambda *given, **named: (
            (given[0] / "shards").exists() or time.sleep(slow_data),
            made(*given, **named),
        )
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    code = cli.main(words)
    atexit._run_exitfuncs()  # as a Python that was not forked does: jax.distributed leaves there
    sys.exit(code)


def _cheap_losses(objective, adapter, model, batch, draws, reference_errors=None, swap_distance=None):
    """Stands in for `pair_losses`, which takes seconds to trace: depends on batch, noise and adapter alone."""
    import jax.numpy as jnp

    from psa_jax.interop.native import adapter_arrays
    from psa_jax.preference.metrics import memberships
    from psa_jax.preference.pair_loss import PairLosses

    pairs = jnp.mean(batch["chosen"].astype(jnp.float32), axis=(1, 2, 3)) + jnp.mean(batch["user"], axis=1)
    aims = pairs * jnp.mean(draws.noise, axis=(1, 2, 3))  # as in the real one, a pair's place matters

    def gap(array):  # mean of (array − aim)² for each aim
        return jnp.mean(array**2) - 2.0 * aims * jnp.mean(array) + aims**2

    gaps = [gap(array) for array in adapter_arrays(adapter).values()]
    values = {
        "loss": sum(gaps[1:], gaps[0]),
        "accuracy": jnp.full_like(aims, 0.5),
        "margin": aims,
        "winner_gap": gaps[0],
    }
    return PairLosses(values, memberships(draws.timesteps, model.schedule.steps, batch["banned"], batch["unsafe"]))


def rows(workdir: Path) -> list[dict[str, float]]:
    """The metrics, but for the times."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def adapter(workdir: Path) -> bytes:
    return (workdir / "psa_adapter.safetensors").read_bytes()
