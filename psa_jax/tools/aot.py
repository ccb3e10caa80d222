"""`psa-jax aot`: what a program of a configuration takes and costs on TPUs that are not here, before one is rented.

libtpu's compiler needs no TPU. Of the base model's weights only the shapes are read. The last line on stdout is JSON.
"""

import json
from argparse import Namespace
from importlib.metadata import version
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.files import check_new, write
from psa_jax.progress import print_stage
from psa_jax.training.aot import largest_batch, measure, summary
from psa_jax.training.chips import GIB, Chip, chip_of
from psa_jax.training.lowered import topology_devices
from psa_jax.training.programs import Asked, Work, work_of
from psa_jax.training.settings import validate

_SCOPES = 12  # lines of the table; the JSON has all


def run(args: Namespace) -> int:
    """Compiles, prints a table and the same as JSON.

    Raises:
      PSAError: a slice or a batch that does not go, or with --largest a batch of which the smallest does not fit.
    """
    config = args.config
    validate(config, "aot")
    if args.json is not None:
        check_new(args.json)  # before an hour of compiling
    if args.largest and args.batch_size:
        raise PSAError("--largest looks for a batch size, and --batch-size gives one; leave one of the two out")
    chip = chip_of(args.topology)
    devices = topology_devices(args.topology, config.mesh.slices)
    work = work_of(args.what, config, devices, Asked(args.batch_size, args.resolution, args.cached_text, args.steps))
    found = {
        "topology": args.topology,
        "slices": config.mesh.slices,
        "what": args.what,
        "jax": version("jax"),
        "libtpu": version("libtpu"),
    }
    if args.largest:
        found |= _largest(work, chip, args)
    else:
        _announce(args, work.batch_size, work)
        found |= _measured(work, work.batch_size, chip, args.quick)
    if args.what == "train" and "step_ms" in found:
        found |= {"steps": config.steps, "hours": config.steps * found["step_ms"] / 3.6e6}
    found |= {"slice_chips": len(devices), "dtype": "float32" if args.what == "build" else config.dtype}
    for line in _table(found, chip):
        print(line)
    if args.json is not None:
        write(args.json, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    return 0


def _measured(work: Work, batch_size: int, chip: Chip, quick: bool) -> dict[str, Any]:
    return summary(work, batch_size, measure(work, batch_size, quick=quick), chip, timed=not quick)


def _announce(args: Namespace, batch_size: int, work: Work) -> None:
    print_stage(
        f"compiling {args.what} of {batch_size} {work.items} for {work.chips} of {args.topology}; nothing is run",
        "minutes; for a whole Stable Diffusion " + ("ten" if args.quick else "up to an hour"),
    )


def _largest(work: Work, chip: Chip, args: Namespace) -> dict[str, Any]:
    """The summary of the largest batch that fits, and its size."""
    known: dict[int, dict[str, Any]] = {}

    def fits(number: int) -> bool:
        _announce(args, number * work.least, work)
        known[number] = _measured(work, number * work.least, chip, args.quick)
        return known[number]["fits"]

    number = largest_batch(fits)
    if not number:
        needed = known[1]["hbm_bytes"]
        raise PSAError(
            f"{args.topology}: a batch of {work.least} {work.items} takes {needed / GIB:.2f} GiB of a chip's "
            f"{chip.usable / GIB:.2f}; {_MENDED[args.what]}"
        )
    return known[number] | {"largest_batch_per_chip": number * work.least / work.chips, "compiled": len(known)}


_MENDED = {
    "train": "set remat to full, divide the adapter (mesh.fsdp), or the frozen weights, too (mesh.frozen = split)",
    "reference": "divide the frozen weights (mesh.fsdp, mesh.frozen = split)",
    "generate": "give a smaller --resolution, or dtype = bfloat16",
    "build": "give a smaller --resolution",
}


def _table(found: dict[str, Any], chip: Chip) -> list[str]:
    """The lines for a reader."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found["hbm"].items())
    over = found["hbm_free_bytes"] / GIB
    verdict = f"fits, {over:.2f} free" if found["fits"] else f"does NOT fit, {-over:.2f} too many"
    items = found["items"]
    where = found["topology"] if found["slices"] == 1 else f"{found['slices']} slices {found['topology']}"
    lines = [
        f"{found['what']} on {found['chips']} of the {found['slice_chips']} chips of {where}, batch of "
        f"{found['batch_size']} {items}, {found['dtype']}",
        f"memory of a chip, GiB: {found['hbm_bytes'] / GIB:.2f} of {chip.usable / GIB:.2f} ({parts}): {verdict}",
        f"compiled in {found['compile_seconds']:.0f} s",
    ]
    if "flops" not in found:
        return lines
    flop = f"{found['flops']:.4g} FLOP a chip, {found['useful_flops']:.4g} without what is computed again"
    moved = f"collectives, bytes of a chip: {_collectives(found['collectives'])}"
    if "step_ms" not in found:
        return [
            *lines,
            "with the least effort, which makes a program about half as large",
            flop,
            moved,
            *_unknown(found),
        ]
    lines += [
        f"estimated {found['step_ms']:.3f} ms, of which kernels {found['kernel_ms']:.3f}; collectives are not in it; "
        f"MFU {100 * found['mfu']:.1f} %",
        flop,
        f"{found[f'{items}_per_hour']:,.0f} {items} an hour"
        + (f"; {found['hours']:.2f} hours for {found['steps']} steps" if "hours" in found else ""),
        moved,
    ]
    for title, key in (("kind", "by_kind"), ("phase", "by_phase"), ("scope", "by_scope")):
        lines += [f"by {title}, ms without kernels:"]
        lines += [
            f"  {1e3 * cycles / chip.clock:10.3f}  {100 * cycles / max(1, found['cycles']):5.1f} %  {name}"
            for name, cycles in list(found[key].items())[:_SCOPES]
        ]
    if found["kernels"]:
        lines += ["kernels by phase, ms:", *(f"  {ms:10.3f}           {name}" for name, ms in found["kernels"].items())]
    lines += ["the most expensive instructions, ms:"]
    lines += [
        f"  {each['ms']:10.3f}  {each['times']:4d} x  {each['kind']:11}  {each['phase']}: {each['scope']}  "
        f"{each['source'] or '(of the compiler)'}  {each['name']}"
        for each in found["dearest"]
    ]
    return [*lines, *_unknown(found)]


def _unknown(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["unknown_loops"]:
        lines.append(f"loops whose trips are not known count once: {', '.join(found['unknown_loops'])}")
    if found["unknown_kernels"]:
        lines.append(f"kernels whose FLOP are not known count as nothing: {', '.join(found['unknown_kernels'])}")
    return lines


def _collectives(found: dict[str, dict[str, int]]) -> str:
    each = [f"{kind} {about['runs']} x, {about['bytes']:,}" for kind, about in found.items()]
    return "; ".join(each) or "none"
