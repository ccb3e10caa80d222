"""`psa-jax bench step`: seconds and peak memory of a training step, here and the torch way, on random data.

Each way runs in a process of its own on the same device, so that its peak memory is its own: of the process on a CPU,
of the allocator on an accelerator. The processes take turns, a step each, so that what disturbs for a while meets both.
A step of psa_jax starts from cached VAE moments and holds one UNet; the torch way (`bench_torch`) encodes pictures in
every step and holds two UNets.
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

from psa_jax.errors import PSAError
from psa_jax.progress import print_stage
from psa_jax.tools.turns import Load, spread, take_turns


def run(args: Namespace) -> int:
    """Measures both ways and prints the ratios: how many times faster, and which share of the memory."""
    from psa_jax.interop.base_model import EMBEDDED, BaseModel
    from psa_jax.training.settings import user_dim, validate  # not above: the process for torch loads no JAX

    config = args.config
    validate(config, "bench step")
    if args.against == "torch" and importlib.util.find_spec("diffusers") is None:
        raise PSAError("bench step compares with torch and diffusers; pip install 'psa_jax[torch]'")
    spec = {
        **dataclasses.asdict(BaseModel.from_config(config)),
        "config": json.loads(config.to_json()),
        "user_dim": user_dim(config),
        "cached_text": args.cached_text,
        "pairs": args.pairs or config.batch_size,
        "resolution": args.resolution,
    }
    if args.against == "torch" and (spec["vae"] or (spec["model"] != EMBEDDED and not Path(spec["model"]).is_dir())):
        raise PSAError("bench step --against=torch takes a model's folder, with its own VAE; leave --against out")
    if args.against == "torch" and config.objective.get("loss") == "none":
        raise PSAError(
            "bench step: the torch way is Diffusion-DPO, and objective.loss is none; give --config=tiny:dpo or "
            "another loss, or leave --against out"
        )
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
    result |= {name: spec[name] for name in ("model", "pairs", "resolution", "cached_text")}
    result |= {name: config[name] for name in ("dtype", "remat", "accumulate")}
    result |= {
        "steps": args.steps,
        "ema": config.optimizer.ema,
        "mesh": config.mesh.to_dict(),
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

    from psa_jax.training.lowered import compile_step
    from psa_jax.training.setup import TEXT_ENCODERS, Setup
    from psa_jax.training.step import make_step

    config, pairs = ml_collections.ConfigDict(spec["config"]), spec["pairs"]
    unused = ("vae", *(TEXT_ENCODERS if spec["cached_text"] else ()))
    setup = Setup.from_config(config, user_dim=spec["user_dim"], cached_text=spec["cached_text"], abstract=unused)
    state, key, frozen = setup.init_state(config.seed), setup.key(config.seed), setup.random_frozen(pairs)
    batch = setup.batch.random(pairs, spec["resolution"] or setup.model.square_side)
    batch = jax.device_put(batch, setup.batch_sharding)
    step = compile_step(make_step(setup), state, frozen, batch, key)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        return float(metrics["loss"])

    return run


def _torch_step(spec: dict[str, Any]) -> Callable[[], float]:
    from psa_jax.interop.diffusers import TINY
    from psa_jax.interop.folder import read_folder
    from psa_jax.interop.parts import square_side
    from psa_jax.tools.bench_torch import make_step

    config, folder = spec["config"], TINY if spec["model"] == "tiny" else Path(spec["model"])
    configs = read_folder(folder).configs
    return make_step(
        folder,
        variant=spec.get("variant"),
        dtype=config["dtype"],
        pairs=spec["pairs"],
        resolution=spec["resolution"] or square_side(configs["unet"], configs["vae"], folder),
        user_dim=spec["user_dim"],
        tokens=config["adapter"]["tokens"],
        beta=config["objective"]["beta"],
        sft_weight=config["objective"]["sft_weight"],
    )


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
