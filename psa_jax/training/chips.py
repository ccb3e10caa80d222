"""TPU chips for which compiled programs are costed: what they compute and hold, and where each number is from."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from psa_jax.errors import PSAError
from psa_jax.rules import quoted

GIB = 1 << 30
_SLICE = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)+)")


class Chip(NamedTuple):
    """A chip, which JAX sees as one device.

    Attributes:
      kind: JAX's `device_kind`.
      clock: cycles a second.
      peak: FLOP a second in bfloat16.
      hbm: bytes of memory on the data sheet.
      usable: bytes of them that a program can have, as libtpu's compiler says where one does not fit.
      sides: numbers in the name of a slice: 2 for chips in a plane (v5e:4x4), 3 for others (v5p:2x2x1).
    """

    kind: str
    clock: float
    peak: float
    hbm: int
    usable: int
    sides: int


CHIPS = {
    # Peak and memory: https://cloud.google.com/tpu/docs/v5e (197 TFLOPs, 16 GB). It names one core with four matrix
    # units, each of 128 × 128 (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm): 131,072 FLOP a cycle, of
    # which the peak makes 1.50 GHz. libtpu 0.0.42.1: "available HBM (15.75G)".
    "v5e": Chip("TPU v5 lite", 1.5e9, 197e12, 16 * GIB, int(15.75 * GIB), 2),
    # https://cloud.google.com/tpu/docs/v5p (459 TFLOPs, 95 GB; 103e9 bytes in jax/_src/pallas/mosaic/tpu_info.py). Two
    # cores with four such units: 262,144 FLOP a cycle, of which the peak makes 1.75 GHz; no page gives a clock.
    # libtpu: "available HBM (95.74G)".
    "v5p": Chip("TPU v5", 1.75e9, 459e12, 103_000_000_000, int(95.74 * GIB), 3),
    # https://cloud.google.com/tpu/docs/v6e (918 TFLOPs, 32 GB, one core with two matrix units of 256 × 256). No page
    # gives a clock, and 262,144 FLOP a cycle would make 3.5 GHz. libtpu estimates 369,000 FLOP a cycle for a product of
    # 8192 × 8192 in bfloat16, so that a unit does twice as many: 524,288, of which the peak makes 1.75 GHz.
    # libtpu: "available HBM (31.25G)".
    "v6e": Chip("TPU v6 lite", 1.75e9, 918e12, 32 * GIB, int(31.25 * GIB), 2),
    # Not v4: libtpu describes its slices core by core, and a program there is compiled for a whole chip.
}
"""First part of a slice's name -> its chip."""


def chip_of(topology: str) -> Chip:
    """The chip of a slice, by the slice's name.

    Raises:
      PSAError: no name of a slice, or of chips that are not in `CHIPS`.
    """
    found = _SLICE.fullmatch(topology)
    if found is None or found[1] not in CHIPS or found[2].count("x") + 1 != CHIPS[found[1]].sides:
        raise PSAError(
            f"topology {quoted(topology)} is no slice whose cost is known; give v5e or v6e with two sides, such as "
            "v5e:4x4, or v5p with three, such as v5p:2x2x1"
        )
    return CHIPS[found[1]]


def of_first_host(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices of a slice that belong to its first host."""
    return [device for device in devices if device.process_index == devices[0].process_index]
