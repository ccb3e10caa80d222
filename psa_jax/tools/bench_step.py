"""`psa-jax bench step`: seconds and peak memory of a training step, here and the torch way, on random data.

Each way runs in a process of its own on the same device, so that its peak memory is its own: of the process on a CPU,
of the allocator on an accelerator. The processes take turns, a step each, so that what disturbs for a while meets both.
Here a step starts from cached VAE moments and holds one UNet; the torch way (`bench_torch`) encodes pictures anew and
holds two.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.progress import print_stage
from psa_jax.tools.turns import Load, spread, take_turns

USER_DIM = 35  # of the `features` encoder


def run(args: Namespace) -> int:
    """Measures both ways and prints the ratios: how many times faster, and which share of the memory."""
    from psa_jax.interop.base_model import EMBEDDED, BaseModel
    from psa_jax.training.settings import validate  # not above: the process that measures torch loads no JAX

    config = args.config
    validate(config, "bench step")
    if args.against == "torch" and importlib.util.find_spec("diffusers") is None:
        raise PSAError("bench step compares with torch and diffusers; pip install 'psa_jax[torch]'")
    spec = {
        **dataclasses.asdict(BaseModel.from_config(config)),
        "adapter": config.adapter.to_dict(),
        "objective": config.objective.to_dict(),
        "optimizer": config.optimizer.to_dict(),
        "dtype": config.dtype,
        "remat": config.remat,
        "draws": config.reference.draws,
        "pairs": args.pairs or config.batch_size,
        "resolution": args.resolution,
        "steps": args.steps,
    }
    if args.against == "torch" and (spec["vae"] or (spec["model"] != EMBEDDED and not Path(spec["model"]).is_dir())):
        raise PSAError("bench step --against=torch takes a model's folder, with its own VAE; leave --against out")
    ways, load = ["ours", *filter(None, [args.against])], Load()
    with contextlib.ExitStack() as stack:
        workers = {}
        for way in ways:
            print_stage(f"{way}: reading the model, compiling and a first step of {spec['pairs']} pairs")
            workers[way] = stack.enter_context(_Worker(way, spec))
        devices = {way: worker.device for way, worker in workers.items()}
        if len(set(devices.values())) > 1:
            raise PSAError(
                f"bench step: JAX ran on {devices['ours']} and torch on {devices['torch']}, which compares devices; "
                "install both for the same one, or set JAX_PLATFORMS or CUDA_VISIBLE_DEVICES"
            )
        turns = take_turns({way: worker.step for way, worker in workers.items()}, args.steps)
        peaks = {way: worker.peak_bytes() for way, worker in workers.items()}
    result = {}
    for way in ways:
        result |= spread(f"{way}_seconds", [turn[way] for turn in turns]) | {f"{way}_peak_bytes": peaks[way]}
    if args.against == "torch":
        result |= spread(
            "ratio_time", [turn["torch"] / turn["ours"] for turn in turns], 3
        )  # above 1: faster than torch
        result["ratio_memory"] = round(peaks["ours"] / peaks["torch"], 3)  # below 1: lighter than torch
    result |= {name: spec[name] for name in ("model", "pairs", "resolution", "steps", "dtype", "remat")}
    result |= {
        "kind": config.adapter.kind,
        "stored_draws": config.reference.draws,
        "first_loss": workers["ours"].first_loss,  # ln 2 for the sigmoid: an untrained adapter changes nothing
        "device": devices["ours"],
        **load.summary(),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


class _Worker:
    """A process that runs one way's step whenever it is asked to.

    Attributes:
      device: its name.
      first_loss: of the step that was run before any that is measured.

    Raises:
      PSAError: the process ended.
    """

    def __init__(self, way: str, spec: dict[str, Any]):
        words = [sys.executable, "-m", __name__, way, json.dumps(spec)]
        # JAX would take most of an accelerator's memory for itself, and the other way is there, too.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        self._way, pipe = way, subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.device, self.first_loss = self._ask("start")

    def step(self) -> float:
        """Seconds of one more step."""
        return self._ask("step")

    def peak_bytes(self) -> int:
        """The most that was held at once so far."""
        return self._ask("peak")

    def _ask(self, what: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and so does its answer
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.__exit__()
            raise PSAError(
                f"bench step: the process that measures {self._way!r} ended with code {code}; see above; where memory "
                "was short, give fewer --pairs: both ways are held at once"
            )
        return json.loads(answer)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def _main(way: str, spec: dict[str, Any]) -> None:
    """Answers every line on stdin with one of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    step = {"ours": _our_step, "torch": _torch_step}[way](spec)
    for line in sys.stdin:
        device, peak = {"ours": _our_device, "torch": _torch_device}[way]()
        if line == "start\n":
            answer = device, step()  # it allocates, and is not measured
        elif line == "step\n":
            start = time.perf_counter()
            step()
            answer = time.perf_counter() - start
        else:
            answer = peak
        print(json.dumps(answer), file=answers)


def _process_peak() -> int:
    """Bytes. Linux's own record is of this program alone; ru_maxrss begins with what the one that started it held."""
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))):
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _our_device() -> tuple[str, int]:
    """Its name and the most bytes that were held at once."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return "cpu", _process_peak()
    return device.device_kind, device.memory_stats()["peak_bytes_in_use"]


def _torch_device() -> tuple[str, int]:
    import torch

    if not torch.cuda.is_available():
        return "cpu", _process_peak()
    return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()


def _our_step(spec: dict[str, Any]) -> Callable[[], float]:
    import jax
    import ml_collections

    from psa_jax.interop.base_model import BaseModel
    from psa_jax.models.adapter_config import AdapterConfig
    from psa_jax.preference.objective import Objective
    from psa_jax.preference.pair_loss import batch_arrays
    from psa_jax.training.optimizer import make_optimizer
    from psa_jax.training.reference import stored_or_none
    from psa_jax.training.sharding import by_rows, make_mesh, replicated, shardings
    from psa_jax.training.step import compiled, init_state, make_step

    model, mesh = BaseModel.from_config(spec).load(dtype=spec["dtype"], abstract=("vae",)), make_mesh(1)
    adapter = AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, **spec["adapter"])
    optimizer = make_optimizer(ml_collections.ConfigDict(spec["optimizer"]), 10_000)
    objective = Objective(**spec["objective"])
    stored = stored_or_none(spec["draws"], 0, objective, flips=False)
    step, frozen = make_step(model, adapter, objective, optimizer, mesh, remat=spec["remat"], stored=stored)
    if stored is not None:
        frozen = frozen._replace(
            reference=jax.device_put(np.ones((spec["pairs"], stored.count, 2), np.float32), replicated(mesh))
        )
    state = init_state(adapter, optimizer, 0)
    state = jax.device_put(state, shardings(state, mesh))
    of_pairs, of_all = batch_arrays(len(model.text_encoders), stored is not None)
    rows = random_rows(model, spec["pairs"], spec["resolution"])
    batch = jax.device_put({name: rows[name] for name in of_pairs}, by_rows(mesh))
    empty = (ids[0] for ids in model.token_ids([""]))
    batch |= jax.device_put(dict(zip(of_all, empty, strict=True)), replicated(mesh))
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    step = compiled(step, state, frozen, batch, key)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        return float(metrics["loss"])

    return run


def random_rows(model: Any, pairs: int, resolution: int | None = None) -> dict[str, np.ndarray]:
    """What shards would give: so many pairs of pictures of so many pixels on a side (default: the model's own)."""
    rng, factor = np.random.default_rng(0), model.vae.config.downscale
    side = (resolution or model.square_side) // factor
    moments = (pairs, side, side, 2 * model.vae.config.latent_channels)
    ids = model.token_ids(["a picture"] * pairs)
    return {
        "chosen": rng.normal(size=moments).astype(np.float16),
        "rejected": rng.normal(size=moments).astype(np.float16),
        "user": rng.normal(size=(pairs, USER_DIM)).astype(np.float32),
        "banned": rng.integers(2, size=pairs).astype(bool),
        "unsafe": rng.integers(2, size=pairs).astype(np.bool_),
        "row": np.arange(pairs, dtype=np.int32),
        "swapped": np.zeros(pairs, bool),
        "original_size": np.full((pairs, 2), side * factor, np.int32),
        "crop": np.zeros((pairs, 2), np.int32),
        **dict(zip(("input_ids", "input_ids_2"), ids, strict=False)),
    }


def _torch_step(spec: dict[str, Any]) -> Callable[[], float]:
    from psa_jax.interop.diffusers import TINY
    from psa_jax.interop.folder import read_folder
    from psa_jax.interop.parts import square_side
    from psa_jax.tools.bench_torch import make_step

    folder = TINY if spec["model"] == "tiny" else Path(spec["model"])
    configs = read_folder(folder).configs
    return make_step(
        folder,
        variant=spec.get("variant"),
        dtype=spec["dtype"],
        pairs=spec["pairs"],
        resolution=spec["resolution"] or square_side(configs["unet"], configs["vae"], folder),
        user_dim=USER_DIM,
        tokens=spec["adapter"]["tokens"],
        beta=spec["objective"]["beta"],
        sft_weight=spec["objective"]["sft_weight"],
    )


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
