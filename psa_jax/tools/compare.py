"""`psa-jax compare`: trains kinds of adapter with several objectives and seeds, and tabulates their rates."""

import importlib.util
import io
import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np

from psa_jax.data.sage import read_split
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import USER_GROUPS, generate_cases
from psa_jax.files import write
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import adapter_arrays, load_adapter
from psa_jax.mini.comparison import (
    ADAPTERS,
    OBJECTIVES,
    RATES,
    RESULT_FILE,
    Method,
    Result,
    config_of,
    markdown_table,
    parse_method,
    pooled_rates,
    read_result,
    write_result,
)
from psa_jax.mini.comparison_record import run_folder, unpack_record, write_record
from psa_jax.mini.oracle import Oracle, shipped_oracle
from psa_jax.mini.prepare import with_mini
from psa_jax.mini.protocol import HARDER, MiniCase, grouped_cases, judge, make_generator
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import print_stage
from psa_jax.tools.configs import read_config
from psa_jax.training.loop import train, with_swap_distance
from psa_jax.training.run import prepare_run
from psa_jax.training.settings import validate, validate_devices

_MARKERS = dict(zip(OBJECTIVES, "o^s", strict=True))
Cases = dict[str, list[MiniCase]]
"""For each group its cases: `usual`, and the harder ones of unseen users."""


def run(args: Namespace) -> int:
    """Runs the command with its flags."""
    methods = [parse_method(text, args.config.steps) for text in args.methods.split(",")]
    if len(set(methods)) < len(methods):
        raise PSAError("--methods names one method twice; give each once")
    workdir = args.workdir
    require_plots()
    dpo, usual = read_config("tiny:dpo"), read_config("tiny")
    for key in ("seed", "adapter", "objective"):
        if args.config[key] != usual[key]:
            raise PSAError(f"compare: config.{key} is not that of tiny, and a method sets its own; leave it as it is")
    configs = {
        (method, seed): config_of(method, seed, args.config, dpo) for seed in range(args.seeds) for method in methods
    }
    for config in configs.values():
        validate(config, "demo", workdir)
        validate_devices(config)
    first = next(iter(configs.values()))
    model, oracle = BaseModel.from_config(first).load(), shipped_oracle()
    data = with_mini(_with_held_out(first), workdir / "data").data
    most = {"usual": first.evaluate.per_rate.unseen} | dict.fromkeys(HARDER, first.evaluate.per_rate.harder)
    records = read_split(workdir / "data" / "sage", USER_GROUPS["unseen"])
    cases = grouped_cases(records, most, first.data.mini.seed)
    if args.known is not None:
        print_stage(f"{unpack_record(args.known, workdir)} runs are taken from {args.known}")
    done = {
        path.parent: read_result(path.parent, None, cases) for path in sorted(workdir.glob(f"*/{RESULT_FILE}"))
    }  # also of earlier calls, for the table
    for (method, seed), config in configs.items():
        folder = run_folder(workdir, method, seed)
        result = read_result(folder, config, cases)
        if result is None:
            result = _run_one(method, seed, config, data, folder, model, oracle, cases)
            write_result(folder, result, config, cases)
        done[folder] = result
        ended = {path: each for path, each in done.items() if each is not None}
        _write_tables(workdir, list(ended.values()), cases)
        write_record(workdir / "record.jsonl", ended, cases)
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(json.dumps({"table": str(workdir / "table.md"), "runs": sum(each is not None for each in done.values())}))
    return 0


def require_plots() -> None:
    """Raises PSAError where matplotlib is missing, before any run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PSAError("psa-jax compare plots with matplotlib: pip install 'psa_jax[eval]'")


def _with_held_out(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with held-out measurements, which asks for a validation split."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.validate.every = 1
    return changed


def _run_one(
    method: Method,
    seed: int,
    config: ml_collections.ConfigDict,
    data: ml_collections.ConfigDict,
    folder: Path,
    model: StableDiffusion,
    oracle: Oracle,
    cases: Cases,
) -> Result:
    """Trains one adapter and judges it; a run that was interrupted goes on."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.update(shards=data.shards, table=data.table)
    print_stage(f"{method.name}, seed {seed}: {method.steps} steps of {config.batch_size} pairs")
    start = time.perf_counter()
    path = train(config, folder)
    seconds = time.perf_counter() - start
    adapter = load_adapter(path, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)
    generator, table = make_generator(config.evaluate, model, adapter), EmbeddingTable.load(Path(data.table))
    verdicts = {}
    for name, group in cases.items():
        users = table.lookup([case.user_id for case in group])
        verdicts[name] = judge(oracle, generate_cases(generator, group, users, name=f"{method.name}, {name}"), group)
    return Result(method, seed, verdicts, _swap_learnt(config, folder, adapter_arrays(adapter)), round(seconds, 1))


def _swap_learnt(config: ml_collections.ConfigDict, folder: Path, params: dict) -> float:
    """1 − L_swap on held-out banned prompts, also of an adapter that was trained without swap distillation."""
    config = _with_held_out(config)
    with config.unlocked():
        config.objective.update(read_config("tiny").objective)
        config.seed = 0  # the same rows and noise for every run
    measured = prepare_run(config, folder)
    found = measured.held_out(params, with_swap_distance(measured, measured.frozen))
    if "held_out_swap_learnt_banned" not in found:
        raise PSAError(
            f"compare: of the {config.validate.rows} held-out rows none is a banned prompt; raise validate.rows"
        )
    return found["held_out_swap_learnt_banned"]


def _write_tables(workdir: Path, results: Sequence[Result], cases: Cases) -> None:
    """Writes the table, as Markdown and JSON, and the plot."""
    parts = [f"## {name}\n\n{markdown_table(results, name, group)}" for name, group in cases.items()]
    write(workdir / "table.md", "\n".join(parts))
    rows = []
    for result in results:
        rates = pooled_rates([result], "usual", cases["usual"])
        row = {"method": result.method.name, "seed": result.seed, "swap_learnt": result.swap_learnt}
        rows.append(row | {name: rates[name] and rates[name][0] for name in RATES} | {"seconds": result.seconds})
    write(workdir / "runs.json", json.dumps(rows, indent=1) + "\n")
    write(workdir / "swap_learnt.png", _plot(results, cases["usual"]), mode=0o644)


def _plot(results: Sequence[Result], cases: Sequence[MiniCase]) -> bytes:
    """Plots clean suppressed pictures over the share of the swap that is learnt, a point for each run, as PNG.

    A colour is an adapter, a form an objective.
    """
    from matplotlib.figure import Figure  # imported late: slow, and of the `eval` extra

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(result.method for result in results):
        of_method = [result for result in results if result.method == method]
        clean = [pooled_rates([result], "usual", cases)["clean"] for result in of_method]
        points = [(r.swap_learnt, rate[0]) for r, rate in zip(of_method, clean, strict=True) if rate is not None]
        look = {"color": f"C{list(ADAPTERS).index(method.adapter)}", "marker": _MARKERS[method.objective]}
        axes.scatter(*np.reshape(points, (-1, 2)).T, s=22, label=method.name, **look)
    axes.set(xlabel="swap_learnt, held-out banned prompts", ylabel="clean, % of suppressed", ylim=(-2, 102))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
