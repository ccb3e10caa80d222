"""`psa-jax curves`: the learning curves of a run as one page, `curves.html` in its folder."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from psa_jax.evaluation.curves import curves_of, read_rows, write_curves
from psa_jax.json_input import read_json
from psa_jax.models.adapter_config import ADDED_SIZES

_OBJECTIVE = ("loss", "beta", "sft_weight", "swap_weight")


def run(args: Namespace) -> int:
    """Writes the page of a run, also of one that goes on; the last line on stdout is JSON with its path.

    Raises:
      PSAError: no run in the folder, or metrics that cannot be read.
    """
    rows = read_rows(args.workdir / "metrics.jsonl")
    config = args.workdir / "config.json"
    path = args.workdir / "curves.html"
    write_curves(path, curves_of(rows), _facts(args.workdir, read_json(config) if config.is_file() else {}, rows))
    print(json.dumps({"curves": str(path), "steps": rows[-1]["step"]}))
    return 0


def _facts(workdir: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """What the page says of the run. A run of an earlier version has no config.json."""
    facts = {
        "Folder": str(workdir),
        "Steps": f"{rows[-1]['step']:,} of {config['steps']:,}" if config else f"{rows[-1]['step']:,}",
    }
    if config:
        adapter, objective = ADDED_SIZES | config["adapter"], config["objective"]
        facts["Base model"] = config["model"]
        facts["Adapter"] = f"{adapter['kind']}, {adapter['tokens']} user tokens, gate {adapter['gate']}"
        asked = ("loss", "sft_weight", "swap_weight") if objective.get("loss") == "none" else _OBJECTIVE
        facts["Objective"] = ", ".join(f"{name} {objective[name]}" for name in asked if name in objective)
        facts["Batch"] = f"{config['batch_size']} pairs, seed {config['seed']}, {config['dtype']}"
    return facts
