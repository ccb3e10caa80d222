"""`psa-jax memory`: the memory that a configuration's training step takes on each device, before any step is run.

The step is compiled for the devices at hand or, by libtpu's compiler, for a TPU slice that is not here. Of the base
model's weights only the shapes are read.
"""

import json
import time
from argparse import Namespace

import jax

from psa_jax.interop.diffusers import MODELS
from psa_jax.progress import print_stage
from psa_jax.training.lowered import compile_to_fit, lower_step, memory, topology_devices
from psa_jax.training.settings import user_dim, validate
from psa_jax.training.setup import Setup


def run(args: Namespace) -> int:
    """Prints a line of JSON: bytes on each device."""
    config = args.config
    validate(config, "memory")
    devices = jax.devices() if args.topology is None else topology_devices(args.topology, config.mesh.slices)
    setup = Setup.from_config(
        config, user_dim=user_dim(config), cached_text=args.cached_text, devices=devices, abstract=MODELS
    )
    kind = devices[0].device_kind
    print_stage(f"compiling the training step of {config.batch_size} pairs for {len(devices)} {kind}; no step is run")
    start = time.perf_counter()
    lowered = lower_step(setup, config.batch_size, args.resolution or setup.model.square_side)
    compiled = compile_to_fit(lowered, args.topology or kind)
    result = memory(compiled) | {
        "device": kind,
        "mesh": dict(setup.mesh.shape),
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "accumulate": setup.accumulate,
        "remat": setup.remat,
        "frozen": setup.frozen_sharding,
        "cached_text": setup.cached_text,
    }
    print(json.dumps(result))
    return 0
