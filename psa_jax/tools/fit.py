"""`psa-jax fit`: the memory that a configuration's training step takes on each device, before any step is run.

The step is compiled for the devices at hand or, by libtpu's compiler, for a TPU slice that is not here. Of the base
model's weights only the shapes are read.
"""

import importlib.util
import json
import os
import time
from argparse import Namespace
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies

from psa_jax.errors import PSAError
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import MODELS
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import batch_arrays
from psa_jax.progress import print_stage
from psa_jax.tools.bench_step import USER_DIM, random_rows
from psa_jax.training.optimizer import make_optimizer
from psa_jax.training.reference import stored_or_none
from psa_jax.training.settings import validate, validate_devices
from psa_jax.training.sharding import by_rows, replicated, shardings
from psa_jax.training.step import init_state, make_step

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_ABOUT = "on two cores 10 to 30 s for tiny, a quarter of an hour for SD1.5 on a TPU, over half an hour for eight"


def run(args: Namespace) -> int:
    """Prints a line of JSON: bytes on each device."""
    config = args.config
    validate(config, "fit")
    devices = jax.devices() if args.topology is None else _slice(args.topology)
    mesh = validate_devices(config, devices)
    model = BaseModel.from_config(config).load(dtype=config.dtype, abstract=MODELS)
    adapter = AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, **config.adapter)
    optimizer, objective = make_optimizer(config.optimizer, config.steps), Objective(**config.objective)
    # How many rows of reference errors there will be is not known here; one is as good as none.
    stored = stored_or_none(config.reference.draws, config.reference.seed, objective, flips=False)
    how = {"accumulate": config.accumulate, "remat": config.remat, "frozen": config.mesh.frozen}
    step, frozen = make_step(model, adapter, objective, optimizer, mesh, ema=config.optimizer.ema, stored=stored, **how)
    whole, rows = replicated(mesh), by_rows(mesh)
    if stored is not None:
        frozen = frozen._replace(reference=_shape(np.zeros((1, stored.count, 2), np.float32), whole))
    state = jax.eval_shape(lambda: init_state(adapter, optimizer, 0, ema=config.optimizer.ema))
    of_pairs, of_all = batch_arrays(len(model.text_encoders), stored is not None)
    arrays = random_rows(model, config.batch_size, args.resolution)
    batch = {name: _shape(arrays[name], rows) for name in of_pairs}
    batch |= {name: _shape(ids[0], whole) for name, ids in zip(of_all, model.token_ids([""]), strict=True)}
    key = _shape(jax.eval_shape(lambda: jax.random.key(0)), whole)

    kind = f"{len(devices)} {devices[0].device_kind}"
    print_stage(f"compiling the training step of {config.batch_size} pairs for {kind}; no step is run", _ABOUT)
    start = time.perf_counter()
    lowered = step.lower(jax.tree.map(_shape, state, shardings(state, mesh)), frozen, batch, key)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise PSAError(
            f"fit: this step does not fit {args.topology or devices[0].device_kind}: {str(error).splitlines()[0]}; "
            "raise accumulate, set remat to full, or divide the frozen weights (mesh.fsdp, mesh.frozen = split)"
        ) from error
    found = compiled.memory_analysis()
    result = {
        "arguments_bytes": found.argument_size_in_bytes,  # frozen weights, adapter and optimizer, batch
        "temporaries_bytes": found.temp_size_in_bytes,  # of a small step none need leave a TPU's on-chip memory
        "program_bytes": found.generated_code_size_in_bytes,
        # An upper bound: what is donated is written over, and not everything is there at one time.
        "total_bytes": found.argument_size_in_bytes + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
        "device": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result | how))
    return 0


def _shape(array: jax.typing.ArrayLike | jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)


def _slice(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice such as v5e:2x4, none of which need be here."""
    if importlib.util.find_spec("libtpu") is None:
        raise PSAError("fit --topology takes libtpu, whose compiler needs no TPU; pip install 'psa_jax[tpu]'")
    jax.config.update("jax_platforms", "cpu")  # what is not compiled only runs here
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine of Google's is asked what it is
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise PSAError(
            f"fit: libtpu knows no slice {name!r} ({error}); give one such as v5e:2x4 or v5p:2x2x1"
        ) from error
    one_each = name.startswith(("v2", "v3"))  # later chips' cores are one device to JAX, here too
    return [device for device in devices if one_each or device.core_on_chip == 0]
