"""One training step on slices of many sizes: what each chip computes, holds and sends. No TPU is needed.

Rows that the table has are not compiled again; each of the others takes minutes. docs/speed.md shows the result.

    python tests/benchmarks/tpu_scale.py MODEL_DIR --table=docs/scale.jsonl --plot=docs/scale.png
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SLICES = {
    ("v5e:2x2", 1): 4,
    ("v5e:4x4", 1): 16,
    ("v5e:8x8", 1): 64,
    ("v5e:16x16", 1): 256,
    ("v5p:2x2x2", 1): 8,
    ("v5p:4x4x4", 1): 64,
    ("v5e:4x4", 2): 32,
}
"""Topology of a slice and number of slices → chips."""

KEPT = ("topology", "slices", "chips", "flops", "hbm_bytes", "hbm", "collective_bytes", "collectives", "jax", "libtpu")
DRAWN = {
    "TFLOP of a chip": lambda row: row["flops"] / 1e12,
    "GiB of a chip": lambda row: row["hbm_bytes"] / 2**30,
    "MB that a chip sends": lambda row: row["collective_bytes"] / 1e6,
}


def compile_row(model: Path, topology: str, slices: int, chips: int) -> dict[str, Any]:
    """The default step of SD1.5, one pair a chip, by `psa-jax aot` in a process of its own."""
    settings = {"model": model, "remat": "none", "accumulate": 1, "mesh.slices": slices, "validate.every": 0}
    words = [sys.executable, "-m", "psa_jax.cli", "aot", "--config=sd15", f"--topology={topology}", "--quick"]
    words += [f"--batch-size={chips}", *(f"--config.{name}={value}" for name, value in settings.items())]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] for name in KEPT}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """What a chip computes, holds and sends, against the number of chips."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    kinds = {"v5e": "o", "v5p": "s", "two slices of v5e": "x"}
    for axes, (title, value) in zip(figure.subplots(1, 3), DRAWN.items(), strict=True):
        for kind, marker in kinds.items():
            of_kind = [
                row for row in rows if (row["topology"][:3] if row["slices"] == 1 else "two slices of v5e") == kind
            ]
            axes.plot(
                [row["chips"] for row in of_kind], [value(row) for row in of_kind], marker, label=kind, fillstyle="none"
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="chips, one pair each", title=title, ylim=(0, 1.2 * max(map(value, rows))))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def main() -> None:
    """Completes the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of Stable Diffusion 1.5; only shapes are read")
    parser.add_argument("--table", type=Path, required=True, help="one line of JSON for each slice")
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    lines = args.table.read_text(encoding="utf-8").splitlines() if args.table.exists() else []
    known = {(row["topology"], row["slices"]): row for row in map(json.loads, lines)}
    for (topology, slices), chips in SLICES.items():
        if (topology, slices) not in known:
            known[topology, slices] = compile_row(args.model, topology, slices, chips)
            with args.table.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[topology, slices]) + "\n")
    draw([known[each] for each in SLICES]).savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
