"""What a compiled program costs, counted in its optimised HLO: cycles, FLOP, kernels and collectives.

XLA:TPU writes an estimate of cycles at each instruction that it schedules. The estimates of those that run are summed,
those of a loop's body times its trips; what is inside a fusion is part of the fusion. Custom kernels have no estimate:
they count as their padded FLOP at half of the chip's peak. Neither counts the time of collectives and of copies in the
background.

FLOP are those of matrix products and convolutions, two for each multiplication whose operands are both there: no
padding, no holes of a dilation.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from psa_jax.training.hlo import Array, Computation, Instruction, Module, parse

KINDS = ("attention", "convolution", "dense", "norm", "other")
"""What instructions do: attention's products and softmax, convolutions, products with weights, norms, the rest."""
KERNEL_SHARE = 0.5
"""Share of the chip's peak at which a custom kernel is taken to compute."""
SCOPE_DEPTH = 3
"""Parts of a scope that are kept, such as policy/unet/up_blocks_1."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_LANES = 128  # width of a TPU's registers and matrix units, to which a kernel pads heads

# Products of [rows, keys] by the width of a head in each kernel of splash attention, and how many of them a gradient
# needs where the weights are kept: the kernel of the backward pass computes the weights again.
_SPLASH = {"splash_mha_fwd": (2, 2), "splash_mha_dkv": (5, 4)}
# In a large program the compiler leaves a kernel its name alone.
_SPLASH_PHASES = {"splash_mha_dkv": "backward", "splash_mha_fwd_residuals": "forward"}
_QUERIES, _KEYS = 2, 3  # their operands; those before say which tiles are masked

_WRAPPED = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint)\((.*)\)")
_NO_SCOPE = re.compile(
    r"jit\(.*\)|while|body|cond|scan|checkpoint|rematted_computation|closed_call|core_call|shard_map|pjit|"
    r"custom_jvp_call|custom_vjp_call|branch_\d+_fun|splash_mha.*|loss|accumulate|"
)
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)")


class Row(NamedTuple):
    """An instruction that runs.

    Attributes:
      name: in the compiler's words.
      times: how often it runs.
      cycles: estimated, all times together.
      flops: of all times together.
      useful: FLOP without what is computed a second time for the backward pass.
      padded: FLOP of a custom kernel with the padding of its heads; 0 for other instructions.
      kind: of `KINDS`.
      phase: see `phase_of`.
      scope: see `scope_of`, to `SCOPE_DEPTH`, without those that only name a kind.
      source: file and line.
    """

    name: str
    times: int
    cycles: int
    flops: int
    useful: int
    padded: int
    kind: str
    phase: str
    scope: str
    source: str

    @property
    def is_kernel(self) -> bool:
        """Whether it is a custom kernel, which has no estimate of cycles."""
        return self.padded > 0


class Cost(NamedTuple):
    """What a program costs on each chip.

    Attributes:
      rows: instructions with cycles, FLOP or both.
      collectives: kind -> number of runs and bytes that a chip gives or gets.
      unknown_loops: names of loops whose trips are not known; their bodies count once.
      unknown_kernels: names of custom kernels whose FLOP are not known; they count as nothing.
    """

    rows: tuple[Row, ...]
    collectives: dict[str, tuple[int, int]]
    unknown_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...]

    @property
    def cycles(self) -> int:
        """Estimated, without kernels."""
        return sum(row.cycles for row in self.rows)

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and kernels."""
        return sum(row.flops for row in self.rows)

    @property
    def useful_flops(self) -> int:
        """FLOP without what is computed a second time."""
        return sum(row.useful for row in self.rows)

    @property
    def kernel_flops(self) -> int:
        """Padded FLOP of custom kernels."""
        return sum(row.padded for row in self.rows)

    def seconds(self, clock: float, peak: float) -> float:
        """Estimated time.

        Args:
          clock: cycles a second.
          peak: FLOP a second.
        """
        return self.cycles / clock + kernel_seconds(self.kernel_flops, peak)

    def by(self, group: Callable[[Row], str]) -> dict[str, int]:
        """Cycles of each group of rows, most first; kernels have none."""
        found: Counter[str] = Counter()
        for row in self.rows:
            found[group(row)] += row.cycles
        return {name: cycles for name, cycles in found.most_common() if cycles}


def kernel_seconds(padded: int, peak: float) -> float:
    """Time of custom kernels of so many padded FLOP on a chip of so many FLOP a second."""
    return padded / (KERNEL_SHARE * peak)


def cost_of(text: str) -> Cost:
    """Counts a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
    """
    counter = _Counter(parse(text))
    counter.count(counter.module.entry, 1)
    collectives = {kind: (counter.runs[kind], counter.bytes[kind]) for kind in sorted(counter.runs)}
    return Cost(tuple(counter.rows), collectives, tuple(counter.loops), tuple(counter.kernels))


# --- the walk over what runs


class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.rows: list[Row] = []
        self.runs: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.loops: list[str] = []
        self.kernels: list[str] = []

    def count(self, computation: str, times: int) -> None:
        """Adds what a computation costs that runs so many times."""
        around = self.module.computations[computation]
        for instruction in around.values():
            called = instruction.called
            if instruction.opcode == "while":
                trips = self.module.trips(instruction, around)
                if trips is None:
                    self.loops.append(instruction.name)
                self.count(called["body"], times * (1 if trips is None else trips))
            elif instruction.opcode == "conditional":
                self.count(self._dearest(called), times)
            elif instruction.opcode in ("call", "async-start") and (called.get("calls") or called.get("to_apply")):
                self.count(called.get("calls") or called["to_apply"], times)
            else:
                self._add(instruction, around, times)

    def _dearest(self, called: dict[str, str]) -> str:
        """The branch with the most cycles."""

        def cycles(name: str) -> int:
            alone = _Counter(self.module)
            alone.count(name, 1)
            return sum(row.cycles for row in alone.rows)

        return max(called.values(), key=cycles)

    def _add(self, instruction: Instruction, around: Computation, times: int) -> None:
        self._add_collectives(instruction, around, times)
        op_name, cycles = instruction.op_name, instruction.cycles or 0
        if _KERNEL in instruction.rest:
            flops, useful, padded = _kernel_flops(instruction, around)
            if not padded:
                self.kernels.append(instruction.name)
            is_attention = "attention" in scope_of(op_name) or instruction.name.startswith(tuple(_SPLASH))
            kind = "attention" if is_attention else "other"
        else:
            products = list(self._products(instruction, around))
            flops, padded = sum(each for _, each in products), 0
            useful = flops
            largest = max(products, key=lambda each: each[1], default=None)
            kind = _kind(op_name, largest and largest[0])
        if "rematted_computation" in op_name:
            useful = 0
        if cycles or flops or padded:
            row = Row(
                instruction.name,
                times,
                times * cycles,
                times * flops,
                times * useful,
                times * padded,
                kind,
                phase_of(op_name) if op_name else _phase_of_kernel(instruction.name),
                _module(op_name),
                self.module.source(instruction),
            )
            self.rows.append(row)

    def _products(self, instruction: Instruction, around: Computation) -> Iterator[tuple[str, int]]:
        """Scope and FLOP of every product and convolution that an instruction is or has inside."""
        if instruction.opcode in ("convolution", "dot"):
            flops = _FLOPS[instruction.opcode](instruction, around)
            yield instruction.op_name, flops
        elif instruction.opcode == "fusion":
            inside = self.module.computations[instruction.called["calls"]]
            for each in inside.values():
                for op_name, flops in self._products(each, inside):
                    yield op_name or instruction.op_name, flops

    def _add_collectives(self, instruction: Instruction, around: Computation, times: int) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self.runs[kind] += times
            self.bytes[kind] += times * _moved(kind, instruction, around)
        elif instruction.opcode == "fusion":
            inside = self.module.computations[instruction.called["calls"]]
            for each in inside.values():
                self._add_collectives(each, inside, times)


def _moved(kind: str, instruction: Instruction, around: Computation) -> int:
    """Bytes of a collective: of what a chip puts in, or for all-gather of what it gets."""
    given = sum(array.bytes for name in instruction.operands if name in around for array in around[name].results)
    made = sum(array.bytes for array in instruction.results)
    if kind == "all-gather":  # -start also names what was given
        return made - given if instruction.opcode.endswith("-start") else made
    return given


# --- names


def _parts(op_name: str) -> list[str]:
    """Parts of a path; a slash inside parentheses divides nothing."""
    parts, depth = [""], 0
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def scope_of(op_name: str) -> list[str]:
    """Named scopes of an instruction, outermost first, without what JAX adds and without the primitive.

    `jit(train_step)/transpose(jvp(loss))/policy/unet/mid_block/dot_general` is policy, unet, mid_block. Of instructions
    that became one, whose names a semicolon joins, it is that of the first.
    """
    found = []
    for part in _parts(op_name.partition(";")[0])[:-1]:
        while wrapped := _WRAPPED.fullmatch(part):
            part = wrapped[1]
        found += [each for each in _parts(part) if not _NO_SCOPE.fullmatch(each)]
    return found


def phase_of(op_name: str) -> str:
    """The part of a step that an instruction belongs to.

    Returns:
      `recomputed` (for the backward pass), `backward`, `reference` (predictions of the base model that the loss is
      compared with), `optimizer` or `draw_inputs` of a training step, whose other parts are `forward`; in other
      programs the outermost scope; `other` for what the compiler added.
    """
    op_name = op_name.partition(";")[0]
    scopes = scope_of(op_name)
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if scopes and scopes[0] in ("reference", "swap_target"):
        return "reference"
    if "jvp(" in op_name:
        return "forward"
    return scopes[0] if scopes else "other"


def _phase_of_kernel(name: str) -> str:
    return next((phase for start, phase in _SPLASH_PHASES.items() if name.startswith(start)), "other")


def _module(op_name: str) -> str:
    """The scope of an instruction as one word."""
    return "/".join([part for part in scope_of(op_name) if part not in KINDS][:SCOPE_DEPTH]) or "other"


def _kind(op_name: str, product: str | None) -> str:
    """The kind of an instruction, by its largest product where it has one, and else by its scope.

    Args:
      op_name: its own.
      product: that of its largest product, or None.
    """
    scopes = scope_of(op_name if product is None else product)
    if "attention" in scopes:
        return "attention"
    if product is not None:
        return "convolution" if product.endswith("conv_general_dilated") else "dense"
    return "norm" if "norm" in scopes else "other"


# --- FLOP


def _operand(instruction: Instruction, around: Computation, number: int) -> Array:
    return around[instruction.operands[number]].results[0]


def _dot_flops(instruction: Instruction, around: Computation) -> int:
    left = _operand(instruction, around, 0)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
    depth = int(np.prod([left.shape[int(axis)] for axis in contracted.split(",") if axis], initial=1))
    return 2 * instruction.results[0].size * depth


def _convolution_flops(instruction: Instruction, around: Computation) -> int:
    """As XLA counts it: for each axis the pairs of a place of the output and one of the kernel that meet an input."""
    image, kernel, made = *(_operand(instruction, around, n) for n in (0, 1)), instruction.results[0]
    of_image, of_kernel, of_made = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    groups, batch_groups = (_number(instruction, name) for name in ("feature_group_count", "batch_group_count"))
    window = {name: value.split("x") for name, value in _WINDOW.findall(_window(instruction))}
    pairs = 1
    for axis in sorted(set(of_image) & set("0123456789")):
        number = int(axis)

        def of(name: str, default: str, number: int = number) -> str:
            return window[name][number] if name in window else default

        size, out = image.shape[of_image.index(axis)], made.shape[of_made.index(axis)]
        before = int(re.match(r"-?\d+", of("pad", "0_0"))[0])
        holes, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
        places = (
            np.arange(out)[:, None] * int(of("stride", "1"))
            + np.arange(int(of("size", "1")))[None, :] * spread
            - before
        )
        pairs *= int(((places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)).sum())
    features = image.shape[of_image.index("f")] // groups * kernel.shape[of_kernel.index("o")]
    return 2 * features * (image.shape[of_image.index("b")] // batch_groups) * pairs


def _window(instruction: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", instruction.rest)
    return found[1] if found else ""


def _number(instruction: Instruction, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", instruction.rest)
    return int(found[1]) if found else 1


_FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops}


def _kernel_flops(instruction: Instruction, around: Computation) -> tuple[int, int, int]:
    """FLOP, useful FLOP and padded FLOP of a custom kernel; zeros where they are not known.

    Splash attention is counted by its shapes, [b, heads, d, n] of queries and [b, heads, d, m] of keys, where a single
    picture has no first axis. Other kernels
    count as the estimate that they were written with, where there is one.
    """
    for name, (computed, useful) in _SPLASH.items():
        if instruction.name.startswith(name):
            query, key = (_operand(instruction, around, n).shape for n in (_QUERIES, _KEYS))
            *batch, heads, width, rows = query
            pairs = 2 * math.prod(batch) * heads * rows * key[-1]
            padded = -(-width // _LANES) * _LANES
            return computed * pairs * width, useful * pairs * width, computed * pairs * padded
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
    flops = int(found[1]) if found else 0
    return flops, flops, flops
