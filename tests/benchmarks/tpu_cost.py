"""What parts of the UNet cost on a TPU, from its compiler's own estimates: no TPU is needed.

`psa-jax aot` does the same for whole programs. What is compared with what, and what came of it, is in NOTES.md.

    python tests/benchmarks/tpu_cost.py resnet:64x320 transformer:64x320x8 --backward
"""

import argparse
import collections
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from psa_jax.models.attention import ComputeOptions, CrossContext, Transformer2D
from psa_jax.models.fused_attention import fused_attention
from psa_jax.models.resnet import ResnetBlock
from psa_jax.training.chips import CHIPS
from psa_jax.training.compiled_cost import cost_of, kernel_seconds
from psa_jax.training.lowered import compile_lowered, topology_devices
from psa_jax.training.setup import NO_EXCESS_PRECISION, NO_SPACE_TO_BATCH

_SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


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
        chip, kinds, lines = CHIPS[args.chip], collections.Counter(), []
        for row in cost_of(compiled.as_text()).rows:
            seconds = kernel_seconds(row.padded, chip.peak) if row.is_kernel else row.cycles / chip.clock
            kind = "kernel" if row.is_kernel else row.kind
            kinds[kind] += 1e3 * seconds
            lines.append((1e3 * seconds, f"{kind:12} {row.name}  {row.source}"))
        parts = ", ".join(f"{kind} {ms:.3f}" for kind, ms in kinds.most_common())
        way = "forward + backward" if args.backward else "forward"
        total = sum(kinds.values())
        xla = total - kinds["kernel"]
        print(f"{block} {way}: {total:.3f} ms, XLA {xla:.3f} ({parts}); compiled in {time.monotonic() - start:.0f} s")
        for milliseconds, words in sorted(lines, reverse=True)[: args.top]:
            print(f"  {milliseconds:.4f} {words}")


if __name__ == "__main__":
    main()
