"""What parts of the UNet cost on a TPU, from its compiler's own estimates: no TPU is needed.

libtpu compiles for a slice that is not here, and writes `estimated_cycles` into most instructions. Pallas kernels have
no estimate: they count as their matrix products, padded to the matrix unit's 128 × 128, over half of the chip's peak.
What is compared with what, and what came of it, is in NOTES.md.

    python tests/benchmarks/tpu_cost.py resnet:64x320 transformer:64x320x8 --backward
"""

import argparse
import collections
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from psa_jax.models.attention import ComputeOptions, CrossContext, Transformer2D
from psa_jax.models.fused_attention import fused_attention
from psa_jax.models.resnet import ResnetBlock
from psa_jax.training.lowered import compile_lowered, topology_devices
from psa_jax.training.setup import NO_EXCESS_PRECISION, NO_SPACE_TO_BATCH

CHIPS = {"v5e": (1.5e9, 197e12), "v5p": (1.75e9, 459e12), "v6e": (1.75e9, 918e12)}
"""Clock (Hz) and bfloat16 peak (FLOP/s) of a chip; clocks are what cycles × clock = published peak gives."""
_SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_PRODUCTS = {"fwd": 2, "flash_attention": 2, "dkv": 4, "dq": 3}
_LANES = 128


class Cost(NamedTuple):
    """An instruction: what all of its runs take, the JAX operation that it comes from, and the shape of its result."""

    name: str
    kind: str
    milliseconds: float
    source: str
    shape: str


def costs(compiled: Compiled, chip: str = "v5e") -> list[Cost]:
    """Cost of each instruction of a program, those of loops times their trips, dearest first."""
    clock, peak = CHIPS[chip]
    bodies, entry = _computations(compiled.as_text())
    found = []
    for line, times in _executed(bodies, entry):
        name, shape, kind = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line).groups()
        source = (re.search(r'op_name="([^"]*)"', line) or ["", ""])[1]
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if "tpu_custom_call" in line:
            seconds, kind = _kernel_flops(name, line) / (0.5 * peak), "kernel"
        elif cycles:
            seconds, kind = int(cycles[1]) / clock, _kind(kind, line)
        else:
            continue
        found.append(Cost(name, kind, times * seconds * 1e3, source, shape))
    return sorted(found, key=lambda cost: -cost.milliseconds)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the entry's name."""
    bodies, entry, name = {}, "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and " = " in line:
            bodies[name].append(line)
    return bodies, entry


def _executed(bodies: dict[str, list[str]], name: str, times: int = 1) -> Iterator[tuple[str, int]]:
    for line in bodies[name]:
        yield line, times
        trips = int((re.search(r'"known_trip_count":\{"n":"(\d+)"', line) or [0, 1])[1])
        for called in re.findall(r" (?:while|call|async-start)\(.*(?:body|to_apply|calls)=%([\w.\-]+)", line):
            yield from _executed(bodies, called, times * trips)


def _kind(opcode: str, line: str) -> str:
    if opcode == "fusion":
        opcode = "product" if "kind=kOutput" in line or "convolution_algorithm_config" in line else "fusion"
    return "product" if opcode == "convolution" else opcode


def _kernel_flops(name: str, line: str) -> float:
    """Padded FLOPs of an attention kernel: a product is 2·queries·keys·128·⌈width/128⌉ for each head and picture."""
    result, operands = line.split(" custom-call(")[0], line.split("operand_layout_constraints={")[1]
    query, key = re.findall(r"bf16\[([\d,]+)\]", operands)[:2]
    *outer, width, queries = map(int, query.split(","))
    queries, width = max(queries, width), min(queries, width)  # kernels differ in which axis is last
    keys = max(map(int, key.split(",")[-2:]))
    products = next(count for kernel, count in _PRODUCTS.items() if kernel in name)
    fused = re.search(r"splash_mha_dkv", name) and re.search(r"bf16\[(\d+,){4}\d+\]", result)  # parts of dq
    return 2.0 * math.prod(outer) * queries * keys * _LANES * -(-width // _LANES) * (products + bool(fused))


def parse_options(pairs: list[str]) -> dict[str, bool]:
    """Options of the compiler, from NAME=true or NAME=false."""
    return {name: {"true": True, "false": False}[value] for name, value in (pair.split("=") for pair in pairs)}


def compile_block(block: str, chip: str, *, pictures: int, backward: bool, options: dict[str, bool]) -> Compiled:
    """Compiles a block in bfloat16 for one chip, from shapes.

    Args:
      block: `resnet:SIDExWIDTH` or `resnet:SIDExWIDTHxOUT`, or `transformer:SIDExWIDTHxHEADS`.
      pictures: in a batch.
      backward: also the gradient in the states, and in the text's keys and values; not in weights.
      options: of the compiler.
    """
    kind, sizes = block.split(":")
    side, width, last = (*map(int, sizes.split("x")), None)[:3]
    mesh = Mesh(np.array(topology_devices(_SLICES[chip])[:1]).reshape(1, 1), ("data", "fsdp"))
    where = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=where)

    states = shape(pictures, side, side, width)
    if kind == "resnet":
        make = functools.partial(ResnetBlock, width, last or width, 1280, groups=32, eps=1e-5)
        given = (states, shape(pictures, 1280))
    else:
        make = functools.partial(Transformer2D, width, last, 768, 1, groups=32, linear=False)
        given = (states, (CrossContext(*[shape(pictures, 77, width)] * 2),))
    graph, weights = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: shape(*leaf.shape), weights)
    compute = ComputeOptions("none", fused_attention(mesh, PartitionSpec(("data", "fsdp"))))

    def run(weights, *inputs):
        return nnx.merge(graph, weights)(*inputs, *((compute,) if kind == "transformer" else ()))

    def run_back(weights, inputs, cotangent):
        out, back = jax.vjp(functools.partial(run, weights), *inputs)
        return out, back(cotangent)

    if backward:
        out = shape(*jax.eval_shape(run, weights, *given).shape)
        lowered = jax.jit(run_back, compiler_options=options).lower(weights, given, out)
    else:
        lowered = jax.jit(run, compiler_options=options).lower(weights, *given)
    return compile_lowered(lowered)


def main() -> None:
    """Prints the cost of each block by kind of instruction, and its dearest instructions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("blocks", nargs="+", help="resnet:64x320, resnet:64x640x320, transformer:64x320x8")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--pictures", type=int, default=2, help="in a batch; a pair is two")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        help="of the compiler, over those of a training step, as NAME=true or NAME=false",
    )
    parser.add_argument("--top", type=int, default=10, help="instructions to list")
    args = parser.parse_args()
    options = NO_EXCESS_PRECISION | NO_SPACE_TO_BATCH | parse_options(args.option)
    for block in args.blocks:
        start = time.monotonic()
        compiled = compile_block(block, args.chip, pictures=args.pictures, backward=args.backward, options=options)
        found = costs(compiled, args.chip)
        kinds = collections.Counter()
        for cost in found:
            kinds[cost.kind] += cost.milliseconds
        parts = ", ".join(f"{kind} {ms:.3f}" for kind, ms in kinds.most_common())
        way = "forward + backward" if args.backward else "forward"
        total = sum(kinds.values())
        xla = total - kinds["kernel"]
        print(f"{block} {way}: {total:.3f} ms, XLA {xla:.3f} ({parts}); compiled in {time.monotonic() - start:.0f} s")
        for cost in found[: args.top]:
            print(f"  {cost.milliseconds:.4f} {cost.kind:10} {cost.name}  {cost.source}  {cost.shape}")


if __name__ == "__main__":
    main()
