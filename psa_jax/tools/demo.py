"""`psa-jax demo`: the whole line on the embedded default: data → training → pictures → numbers → report."""

import json
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

import psa_jax
from psa_jax.data.mini import NO_PICTOGRAM, PICTOGRAMS
from psa_jax.data.sage import SageRecord, read_split
from psa_jax.diffusion.generate import Generator, picture_grid
from psa_jax.errors import PSAError
from psa_jax.evaluation.oracle import Oracle, shipped_oracle
from psa_jax.evaluation.protocol import Case, Verdicts, draw_cases, judge, rates, select_cases, wins
from psa_jax.evaluation.report import Grid, write_report
from psa_jax.interop.diffusers import StableDiffusion, load_stable_diffusion
from psa_jax.interop.native import load_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.policy import banned_categories
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools.train import with_mini
from psa_jax.training.loop import train

SPLITS = {"unseen": "test_unseen", "seen": "test_seen"}
RECORDED = Path(__file__).parents[1] / "assets" / "recorded.json"
COMPARED = ("user_blind", "published_t1")


def variant(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The configuration of a comparison adapter: the same training but for one thing."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        if name == "user_blind":
            changed.adapter.constant_user = True
        elif name == "published_t1":
            changed.adapter.kind, changed.adapter.tokens = "published", 1
        else:
            raise PSAError(f"comparison {name!r} is unknown; use one of {', '.join(COMPARED)}")
    return changed


def run(config: ml_collections.ConfigDict, workdir: Path, *, compare: bool = False) -> int:
    """Runs the demo.

    Args:
      compare: train the comparison adapters too, instead of quoting their recorded runs.
    """
    start = time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)
    model, oracle = load_stable_diffusion(config.model), shipped_oracle()
    config = with_mini(config, workdir / "data")
    table = EmbeddingTable.load(Path(config.data.table))

    adapters = {"psa": train(config, workdir / "psa")}
    if compare:
        adapters |= {name: train(variant(config, name), workdir / name) for name in COMPARED}

    layers, cross = model.unet.config.cross_attentions, model.unet.config.cross_attention_dim
    loaded = {name: load_adapter(path, layers, cross) for name, path in adapters.items()}
    report = {
        place: _evaluate(config, model, oracle, loaded, table, read_split(workdir / "data" / "sage", split))
        for place, split in SPLITS.items()
    }
    if not compare:
        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
        for place in SPLITS:
            report[place] |= recorded[place]
        report["recorded"] = {name: recorded["command"] for name in COMPARED}
    unseen = read_split(workdir / "data" / "sage", "test_unseen")
    grid = _grid(config, model, oracle, loaded["psa"], table, unseen)
    Image.fromarray(picture_grid(grid.pictures, len(grid.users))).save(workdir / "grid.png")
    report["versions"] = {"psa_jax": psa_jax.__version__, "jax": jax.__version__}
    report["seconds"] = round(time.perf_counter() - start, 1)
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_report(
        workdir / "report.html", report, grid, _curves(workdir / "psa" / "metrics.jsonl"), ["psa-jax demo"]
    )
    psa = report["unseen"]["psa"]
    print(
        f"unseen users: selectivity {psa['selectivity']:.1f} (suppression {psa['suppression']:.1f}, retention "
        f"{psa['retention']:.1f}), clean {psa['clean']:.1f}, base model {report['unseen']['base']['selectivity']:.1f}, "
        f"user-blind {report['unseen']['user_blind']['selectivity']:.1f}; {report['seconds']:.0f} s; "
        f"report: {workdir / 'report.html'}"
    )
    return 0


def _evaluate(
    config: ml_collections.ConfigDict,
    model: StableDiffusion,
    oracle: Oracle,
    adapters: dict[str, Adapter],
    table: EmbeddingTable,
    records: list[SageRecord],
) -> dict[str, dict[str, float]]:
    """Rates of every method on one split; all methods draw the same cases from the same seeds."""
    part = config.evaluate
    cases = select_cases(records, part.per_rate, config.seed)
    users = table.lookup([case.user_id for case in cases])
    options = {"steps": part.steps, "guidance": part.guidance, "batch_size": part.batch_size}
    verdicts: dict[str, Verdicts] = {"base": judge(oracle, draw_cases(Generator(model, **options), cases, None), cases)}
    for name, adapter in adapters.items():
        generator = Generator(model, adapter, unconditional=part.unconditional, **options)
        seen = np.zeros_like(users) if name == "user_blind" else users
        verdicts[name] = judge(oracle, draw_cases(generator, cases, seen), cases)
    result = {name: rates(verdict, cases) for name, verdict in verdicts.items()}
    for other in verdicts.keys() - {"psa"}:
        win, tie = wins(verdicts["psa"], verdicts[other], cases)
        result["psa"] |= {f"win_rate_vs_{other}": win, f"tie_rate_vs_{other}": tie}
    return result
