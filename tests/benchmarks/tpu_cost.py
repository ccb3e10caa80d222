"""What parts of the UNet cost on a TPU, from its compiler's own estimates: no TPU is needed.

`psa-jax aot` does the same for whole programs. What is compared with what, and what came of it, is in NOTES.md.

    python tests/benchmarks/tpu_cost.py resnet:64x320 transformer:64x320x8 --backward
    python tests/benchmarks/tpu_cost.py unet:64 --unet=MODEL_DIR/unet/config.json --backward
"""

import argparse
import collections
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from psa_jax.models.attention import ComputeOptions, CrossContext, Transformer2D
from psa_jax.models.config import UNetConfig
from psa_jax.models.fused_attention import fused_attention
from psa_jax.models.resnet import ResnetBlock
from psa_jax.models.unet import UNet
from psa_jax.training.chips import CHIPS
from psa_jax.training.compiled_cost import cost_of, kernel_seconds
from psa_jax.training.lowered import compile_lowered, topology_devices
from psa_jax.training.setup import NO_EXCESS_PRECISION, NO_SPACE_TO_BATCH, ROOM_FOR_KERNELS

_SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def parse_options(pairs: list[str]) -> dict[str, bool]:
    """Options of the compiler, from NAME=true or NAME=false."""
    return {name: {"true": True, "false": False}[value] for name, value in (pair.split("=") for pair in pairs)}


def compile_block(
    block: str, chip: str, *, pictures: int, backward: bool, options: dict[str, bool], unet: Path | None = None
) -> Compiled:
    """Compiles a block in bfloat16 for one chip, from shapes.

    Args:
      block: `resnet:SIDExWIDTH` or `resnet:SIDExWIDTHxOUT`, `transformer:SIDExWIDTHxHEADS` or `unet:SIDE`.
      pictures: in a batch.
      backward: also the gradient in the states, and in the text's keys and values (of `unet` in these alone); not in
        weights.
      options: of the compiler.
      unet: configuration of the UNet of `unet:SIDE`.
    """
    kind, sizes = block.split(":")
    side, width, last = (*map(int, sizes.split("x")), None, None)[:3]
    mesh = Mesh(np.array(topology_devices(_SLICES[chip])[:1]).reshape(1, 1), ("data", "fsdp"))
    where = NamedSharding(mesh, PartitionSpec())
    compute = ComputeOptions("none", fused_attention(mesh, PartitionSpec(("data", "fsdp"))))

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    fixed = ()
    if kind == "resnet":
        make = functools.partial(ResnetBlock, width, last or width, 1280, groups=32, eps=1e-5)
        given = (shape(pictures, side, side, width), shape(pictures, 1280))
    elif kind == "transformer":
        make = functools.partial(Transformer2D, width, last, 768, 1, groups=32, linear=False)
        given = (shape(pictures, side, side, width), (CrossContext(*[shape(pictures, 77, width)] * 2),))
    else:
        config = UNetConfig.from_json(json.loads(unet.read_text(encoding="utf-8")))
        make = functools.partial(UNet, config)
        fixed = (shape(pictures, side, side, config.in_channels), shape(pictures, dtype=jnp.float32))
        text = shape(pictures, 77, config.cross_attention_dim)
        contexts = jax.eval_shape(lambda text: UNet(config, rngs=nnx.Rngs(0)).context(text), text)
        given = (jax.tree.map(lambda leaf: shape(*leaf.shape), contexts),)
    graph, weights = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: shape(*leaf.shape), weights)

    def run(weights: nnx.State, fixed: tuple[Any, ...], *inputs: Any) -> jax.Array:
        module = nnx.merge(graph, weights)
        if kind == "unet":
            module.compute = compute
        return module(*fixed, *inputs, *((compute,) if kind == "transformer" else ()))

    def run_back(weights: nnx.State, fixed: tuple[Any, ...], inputs: tuple[Any, ...], cotangent: jax.Array) -> Any:
        out, back = jax.vjp(functools.partial(run, weights, fixed), *inputs)
        return out, back(cotangent)

    if backward:
        out = shape(*jax.eval_shape(run, weights, fixed, *given).shape)
        lowered = jax.jit(run_back, compiler_options=options).lower(weights, fixed, given, out)
    else:
        lowered = jax.jit(run, compiler_options=options).lower(weights, fixed, *given)
    return compile_lowered(lowered)


def main() -> None:
    """Prints the cost of each block by kind of instruction, and its dearest instructions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("blocks", nargs="+", help="resnet:64x320, resnet:64x640x320, transformer:64x320x8, unet:64")
    parser.add_argument("--unet", type=Path, help="config.json of the UNet of unet:64")
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
    options = NO_EXCESS_PRECISION | NO_SPACE_TO_BATCH | ROOM_FOR_KERNELS | parse_options(args.option)
    for block in args.blocks:
        start = time.monotonic()
        sizes = {"pictures": args.pictures, "backward": args.backward}
        compiled = compile_block(block, args.chip, **sizes, options=options, unet=args.unet)
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
        held = compiled.memory_analysis().temp_size_in_bytes / 1e9
        print(
            f"{block} {way}: {total:.3f} ms, XLA {xla:.3f} ({parts}), temporaries {held:.2f} GB; compiled in "
            f"{time.monotonic() - start:.0f} s"
        )
        for milliseconds, words in sorted(lines, reverse=True)[: args.top]:
            print(f"  {milliseconds:.4f} {words}")


if __name__ == "__main__":
    main()
