"""Compiled training steps: from arrays, or from shapes alone for devices that are not here."""

import ctypes
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.stages import Compiled, Lowered

from psa_jax.errors import PSAError
from psa_jax.training.diagnosis import Setting, libtpu
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import replicated
from psa_jax.training.state import Frozen
from psa_jax.training.step import Step, make_step

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# The first where a program is too large, the second where an array of its own is.
_HBM = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|\(([\d.]+)([KMGT]?)\) exceeds available HBM")


def compile_step(step: Step, *inputs: Any) -> Compiled:
    """Compiles the step for inputs, arrays or shapes, and returns the compiler's memory to the system."""
    return compile_lowered(step.lower(*inputs))


def lower_step(setup: Setup, pairs: int, resolution: int) -> Lowered:
    """Lowers the step of a set-up from shapes alone: weights and devices may be absent.

    Args:
      pairs: in a batch.
      resolution: side of the pictures, in pixels.

    Raises:
      PSAError: a batch that devices and parts cannot share evenly.
    """
    state = jax.tree.map(_shape, setup.abstract_state(), setup.state_sharding)
    batch = setup.batch.abstract(pairs, resolution, setup.batch_sharding)
    key = _shape(jax.eval_shape(lambda: jax.random.key(0)), replicated(setup.mesh))
    return make_step(setup).lower(state, abstract_frozen(setup), batch, key)


def abstract_frozen(setup: Setup, rows: int = 1) -> Frozen:
    """Shapes of the frozen arrays, with those that come from data.

    A set-up does not know the number of rows of the data set. It changes no time and few bytes.
    """
    whole = replicated(setup.mesh)
    return setup.frozen()._replace(
        **{
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=whole)
            for name, shape in setup.data_shapes(rows).items()
        }
    )


def compile_lowered(lowered: Lowered, options: dict[str, Any] | None = None) -> Compiled:
    """Compiles, then makes glibc return the memory that the compiler used (1 GB for SD1.5 on a CPU).

    Args:
      options: of the compiler, over those that it was lowered with.
    """
    compiled = lowered.compile(options)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return compiled


def compile_to_fit(lowered: Lowered, where: str) -> Compiled:
    """Compiles; a step that takes more memory than a device has is an error of one line.

    Args:
      where: the devices, in words.

    Raises:
      PSAError: the step does not fit.
    """
    try:
        return compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise PSAError(
            f"this step does not fit {where}: {str(error).splitlines()[0]}; "
            "raise accumulate, set remat to full, or divide the frozen weights (mesh.fsdp, mesh.frozen = split)"
        ) from error


def bytes_needed(error: jax.errors.JaxRuntimeError) -> int | None:
    """Bytes of a TPU's memory that a program would take, from the compiler's error; None for errors of another kind."""
    found = _HBM.search(str(error))
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def memory(compiled: Compiled) -> dict[str, int]:
    """Bytes on each device: arguments (frozen weights, adapter, optimizer, batch), temporaries, program, and their sum.

    The sum is an upper bound: donated arrays are written over, and not everything is held at one time. The temporaries
    of a small step may all be in a TPU's on-chip memory, and then count as 0.
    """
    found = compiled.memory_analysis()
    parts = {
        "arguments_bytes": found.argument_size_in_bytes,
        "temporaries_bytes": found.temp_size_in_bytes,
        "program_bytes": found.generated_code_size_in_bytes,
    }
    return parts | {"total_bytes": sum(parts.values())}


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of a TPU slice such as v5e:2x4, or of several like it, none of which need be here.

    Raises:
      PSAError: libtpu is not installed, is not that of this jax, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PSAError("--topology takes libtpu, whose compiler needs no TPU; pip install 'psa_jax[tpu]'")
    libtpu(Setting())
    jax.config.update("jax_platforms", "cpu")  # arrays that are made on the way live on this machine
    # No cloud service is asked which machine this is, nor which ones are its neighbours.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile: none takes a TPU
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(name, platform="tpu", **several).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise PSAError(f"libtpu cannot describe {name!r} ({error})") from error
        raise PSAError(f"libtpu knows no slice {name!r} ({error}); give one such as v5e:2x4 or v5p:2x2x1") from error
    one_each = name.startswith(("v2", "v3"))  # JAX sees the cores of later chips as one device
    return [device for device in devices if one_each or device.core_on_chip == 0]


def _shape(array: jax.typing.ArrayLike | jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
