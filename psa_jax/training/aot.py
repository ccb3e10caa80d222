"""Programs compiled for TPUs that are not here, measured: memory, and estimated time in all and by part."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from psa_jax.training.chips import Chip
from psa_jax.training.compiled_cost import KINDS, Cost, Row, cost_of, kernel_seconds
from psa_jax.training.lowered import bytes_needed, compile_lowered
from psa_jax.training.programs import Work

LEAST_EFFORT = {"exec_time_optimization_effort": -1.0, "xla_tpu_scoped_vmem_limit_kib": 32 * 1024}
"""Options for a slow program in a fraction of the time. A kernel then keeps more on the chip than it may by default."""
DEAREST = 10
"""Instructions that are listed."""
_UNTIMED = ("flops", "useful_flops", "collective_bytes", "collectives", "unknown_loops", "unknown_kernels")


class Measured(NamedTuple):
    """One compiled program.

    Attributes:
      hbm: bytes on a chip: `arguments`, `outputs` (that no argument is written over with), `temporaries`, `program`; of
        one that does not fit only `total`, as the compiler counted it.
      cost: None for one that does not fit.
      seconds: of compiling.
    """

    hbm: dict[str, int]
    cost: Cost | None
    seconds: float

    @property
    def total(self) -> int:
        """Bytes on a chip, an upper bound: not everything is held at one time."""
        return sum(self.hbm.values())


def measure(work: Work, batch_size: int, *, quick: bool = False) -> dict[str, Measured]:
    """Compiles the programs of a batch.

    Args:
      work: lowered for a slice of TPUs.
      batch_size: items in the batch.
      quick: with `LEAST_EFFORT`; estimated cycles then say nothing.

    Raises:
      PSAError: a batch that the chips cannot share evenly.
    """
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from a cache has no time of compiling
    try:
        options = LEAST_EFFORT if quick else None
        return {name: _compiled(lowered, options) for name, lowered in work.lower(batch_size).items()}
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _compiled(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> Measured:
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(error)
        if needed is None:
            raise
        return Measured({"total": needed}, None, time.perf_counter() - start)
    seconds, found = time.perf_counter() - start, compiled.memory_analysis()
    hbm = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    return Measured(hbm, cost_of(compiled.as_text()), seconds)


def largest_batch(fits: Callable[[int], bool], most: int = 1024) -> int:
    """The largest n from 1 to `most` that fits, by doubling and then bisection; 0 if 1 does not fit.

    Args:
      fits: n -> whether it fits; what is larger than what does not fit is taken not to fit.
      most: where the search ends.
    """
    good, bad = 0, None
    trial = 1
    while bad is None and trial <= most:
        good, bad = (trial, None) if fits(trial) else (good, trial)
        trial *= 2
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def summary(
    work: Work, batch_size: int, found: dict[str, Measured], chip: Chip, *, timed: bool = True
) -> dict[str, Any]:
    """What the programs of a batch take and cost on each chip, as `psa-jax aot` prints it.

    Memory is that of the largest program; cycles, FLOP and bytes are sums over all calls of a batch.

    Args:
      timed: with what estimated cycles say.
    """
    largest = max(found.values(), key=lambda each: each.total)
    compiled = all(each.cost is not None for each in found.values())
    about = {
        "chips": work.chips,
        "batch_size": batch_size,
        "items": work.items,
        "batch_per_chip": batch_size / work.chips,
        "hbm_bytes": largest.total,
        "hbm": largest.hbm,
        "hbm_chip_bytes": chip.hbm,
        "hbm_limit_bytes": chip.usable,
        "hbm_free_bytes": chip.usable - largest.total,
        # With the least effort the compiler refuses only what temporaries alone make too large.
        "fits": compiled and largest.total <= chip.usable,
        "compile_seconds": round(sum(each.seconds for each in found.values()), 1),
    }
    if not compiled:
        return about
    costs = _costs(work, batch_size, found, chip)
    return about | (costs if timed else {name: costs[name] for name in _UNTIMED})


def _costs(work: Work, batch_size: int, found: dict[str, Measured], chip: Chip) -> dict[str, Any]:
    rows, collectives = [], {}
    for name, each in found.items():
        calls = work.calls[name]
        rows += [_times(row, calls) for row in each.cost.rows]
        for kind, (runs, size) in each.cost.collectives.items():
            before = collectives.get(kind, {"runs": 0, "bytes": 0})
            collectives[kind] = {"runs": before["runs"] + calls * runs, "bytes": before["bytes"] + calls * size}
    loops = tuple(loop for each in found.values() for loop in each.cost.unknown_loops)
    kernels = tuple(kernel for each in found.values() for kernel in each.cost.unknown_kernels)
    whole = Cost(tuple(rows), {}, loops, kernels)
    seconds = whole.seconds(chip.clock, chip.peak)
    by_kind = Counter(dict.fromkeys(KINDS, 0)) | Counter(whole.by(lambda row: row.kind))
    return {
        "flops": whole.flops,
        "useful_flops": whole.useful_flops,
        "cycles": whole.cycles,
        "step_ms": 1e3 * seconds,
        "kernel_ms": 1e3 * kernel_seconds(whole.kernel_flops, chip.peak),
        "mfu": whole.useful_flops / (seconds * chip.peak),
        f"{work.items}_per_hour": 3600.0 * batch_size / seconds,
        "collective_bytes": sum(each["bytes"] for each in collectives.values()),
        "collectives": collectives,
        "by_kind": {kind: by_kind[kind] for kind in KINDS},
        "by_phase": whole.by(lambda row: row.phase),
        "by_scope": whole.by(lambda row: row.scope),
        "kernels": _kernels(whole, chip),
        "dearest": _dearest(whole, chip),
        "unknown_loops": list(loops),
        "unknown_kernels": list(kernels),
    }


def _times(row: Row, calls: int) -> Row:
    numbers = ("times", "cycles", "flops", "useful", "padded")
    return row._replace(**{name: calls * getattr(row, name) for name in numbers})


def _seconds(row: Row, chip: Chip) -> float:
    return row.cycles / chip.clock + kernel_seconds(row.padded, chip.peak)


def _kernels(whole: Cost, chip: Chip) -> dict[str, float]:
    """Milliseconds of the custom kernels of each phase."""
    found: Counter[str] = Counter()
    for row in whole.rows:
        if row.is_kernel:
            found[row.phase] += 1e3 * _seconds(row, chip)
    return dict(found.most_common())


def _dearest(whole: Cost, chip: Chip) -> list[dict[str, Any]]:
    """The instructions that take longest."""
    rows = sorted(whole.rows, key=lambda row: -_seconds(row, chip))[:DEAREST]
    names = ("name", "times", "kind", "phase", "scope", "source")
    return [{"ms": 1e3 * _seconds(row, chip)} | {name: getattr(row, name) for name in names} for row in rows]
