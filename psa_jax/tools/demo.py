"""`psa-jax demo`: data, training, generation, evaluation and a report, on the embedded model by default."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jaxtyping import UInt8

import psa_jax
from psa_jax.data.sage import SageRecord, read_split
from psa_jax.diffusion.conditioning import prompt_gates
from psa_jax.diffusion.generate import UNCONDITIONAL, Generator
from psa_jax.diffusion.picture_sheet import picture_sheet
from psa_jax.errors import PSAError
from psa_jax.evaluation.curves import curves_of, read_rows
from psa_jax.evaluation.gate_words import sentence
from psa_jax.evaluation.judged_run import PAGE_FILE, judge_pictures, missing_packages
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.protocol import USER_GROUPS, Verdicts, generate_base, generate_cases, rates, wins
from psa_jax.evaluation.report import Grid, write_report
from psa_jax.files import check_new
from psa_jax.interop.adapter_file import adapter_hash
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import load_adapter, to_file
from psa_jax.mini.comparison import ADAPTERS
from psa_jax.mini.kept_pictures import keep_pictures
from psa_jax.mini.oracle import Oracle, shipped_oracle
from psa_jax.mini.oracle_judge import OracleJudge
from psa_jax.mini.prepare import with_mini
from psa_jax.mini.protocol import (
    ADULT_WITHOUT_BANS,
    HARDER,
    MiniCase,
    case_of,
    group_of,
    grouped_cases,
    judge,
    make_generator,
)
from psa_jax.mini.recorded import (
    COMPARED,
    pack_place,
    read_recording,
    recipe_of,
    recorded_verdicts,
    same_recipe,
    write_recording,
)
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.bans import banned_categories, is_banned
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import print_on_main, print_stage
from psa_jax.tools.configs import read_config
from psa_jax.training.loop import train
from psa_jax.training.settings import validate, validate_devices

COMMAND = "psa-jax demo --workdir=runs/demo"
Methods = dict[str, tuple[Generator, EmbeddingTable]]
"""For each method its generator and the embeddings of its users."""


def variant(config: ml_collections.ConfigDict, name: str, data: Path) -> ml_collections.ConfigDict:
    """Makes the configuration of a comparison adapter.

    `user_blind` differs in one thing, the embedding, which is the same for all users. `published_t1` is the paper's
    adapter, trained by Diffusion-DPO as `tiny:dpo` says.

    Args:
      config: of the personal adapter.
      name: one of `COMPARED`.
      data: folder for a changed embedding table.

    Raises:
      PSAError: the name is unknown.
    """
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        if name == "user_blind":
            changed.data.table = str(constant_table(Path(config.data.table), data / "constant.safetensors"))
        elif name == "published_t1":
            dpo = read_config("tiny:dpo")
            changed.adapter.update(ADAPTERS["published_t1"])
            changed.objective.update(dpo.objective)
            changed.data.update(safe_share=dpo.data.safe_share, banned_share=dpo.data.banned_share)
            changed.steps, changed.checkpoint_every = min(config.steps, dpo.steps), dpo.checkpoint_every
        else:
            raise PSAError(f"comparison {name!r} is unknown; use one of {', '.join(COMPARED)}")
    return changed


def constant_table(source: Path, path: Path) -> Path:
    """Writes a table in which all users have the mean embedding, for the user-blind adapter, and returns its path."""
    table = EmbeddingTable.load(source)
    mean = np.broadcast_to(table.embeddings.mean(axis=0, keepdims=True), table.embeddings.shape)
    dataclasses.replace(table, embeddings=np.ascontiguousarray(mean), encoder="constant").save(path)
    return path


def run(args: Namespace) -> int:
    """Runs the demo with the flags of the command."""
    command = shlex.join(["psa-jax", "demo", *args.words])
    if flags := os.environ.get("XLA_FLAGS", "").strip():
        command = f"XLA_FLAGS={shlex.quote(flags)} {command}"  # it decides the last digits
    ways = {name: vars(args)[name] for name in ("compare", "record", "all_ways")}
    run_demo(args.config, args.workdir, command=command, **ways)
    return 0


def run_demo(
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    compare: bool = False,
    record: Path | None = None,
    all_ways: bool = False,
    command: str = COMMAND,
) -> None:
    """Trains, generates, judges and reports; the last line on stdout is JSON.

    Args:
      config: of training and evaluation.
      workdir: folder for all output.
      compare: trains the comparison adapters too. Otherwise their recorded verdicts are quoted, which exist for the
        default configuration only.
      record: with `compare`, a file for verdicts that later runs quote.
      all_ways: judges the adapter with every unconditional side: export formats for other tools use another side than
        the configuration.
      command: the words with which it was started, for the report.

    Raises:
      PSAError: a wrong flag or configuration, before any work.
    """
    if record is not None and not compare:
        raise PSAError("--record writes the runs that --compare makes; give both")
    if record is not None:
        check_new(record)
    validate(config, "demo", workdir)
    validate_devices(config)
    start, recipe = time.perf_counter(), recipe_of(config)
    recorded = None if compare else read_recording()
    if recorded is not None and not same_recipe(recorded["recipe"], recipe):
        print_on_main(
            "the recorded comparison runs are of another configuration: only the base model is compared; --compare "
            "trains the comparison adapters"
        )
        recorded = None
    print_stage("data, training, judging and a report")
    workdir.mkdir(parents=True, exist_ok=True)

    model, oracle = BaseModel.from_config(config).load(), shipped_oracle()
    config = with_mini(config, workdir / "data")
    methods, adapter = _train_all(config, workdir, model, COMPARED if compare else (), all_ways)
    report, made, kept = _report(config, methods, model, adapter, oracle, workdir, recorded)
    if recorded is not None:
        report["recorded"] = dict.fromkeys(COMPARED, recorded["command"])
    elif record is not None:
        write_recording(record, recipe, made)
    print_stage("generating the pictures of the report")
    grid = _grid(model, adapter, *methods["psa"], oracle, read_split(workdir / "data" / "sage", USER_GROUPS["unseen"]))
    picture_sheet(grid.pictures, grid.users, grid.prompts, grid.banned).save(workdir / "grid.png")
    if missing := missing_packages():
        print_on_main(f"no page of judged pictures without {missing[0]}: pip install 'psa_jax[eval]'")
    else:
        shutil.rmtree(workdir / "judged", ignore_errors=True)  # of an earlier run, perhaps by another oracle
        judge_pictures(kept, {"oracle": OracleJudge()}, workdir / "judged", "base", command)
        report["pictures"] = f"judged/{PAGE_FILE}, beside this page"
    _finish(report | {"command": command}, config, adapter, grid, workdir, start)


def _train_all(
    config: ml_collections.ConfigDict, workdir: Path, model: StableDiffusion, compared: Sequence[str], all_ways: bool
) -> tuple[Methods, Adapter]:
    """Trains the personal and the comparison adapters; returns all methods to judge, and the personal adapter."""
    runs = {"psa": config} | {name: variant(config, name, workdir / "data") for name in compared}
    methods, adapters = {}, {}
    for name, run_config in runs.items():
        print_stage(f"training {name}: {run_config.steps} steps of {run_config.batch_size} pairs")
        path = train(run_config, workdir / name)
        adapters[name] = load_adapter(path, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)
        table = EmbeddingTable.load(Path(run_config.data.table))
        methods[name] = (make_generator(config.evaluate, model, adapters[name]), table)
    for way in UNCONDITIONAL if all_ways else ():
        if way != config.evaluate.unconditional:
            methods[f"psa_{way}"] = (make_generator(config.evaluate, model, adapters["psa"], way), methods["psa"][1])
    return methods, adapters["psa"]


def _report(
    config: ml_collections.ConfigDict,
    methods: Methods,
    model: StableDiffusion,
    adapter: Adapter,
    oracle: Oracle,
    workdir: Path,
    recorded: dict | None,
) -> tuple[dict, dict, list[tuple[Path, Pictured]]]:
    """Judges all methods on unseen and on seen users, and keeps the pictures of unseen ones.

    Returns:
      For each group of users, the rates of every method, and the packed verdicts; and the pictures that were kept.
    """
    report, made, kept, sage = {}, {}, [], workdir / "data" / "sage"
    for place, split in USER_GROUPS.items():
        records = read_split(sage, split)
        cases = grouped_cases(records, {"usual": config.evaluate.per_rate[place]}, config.seed)["usual"]
        print_stage(f"judging {place} users: {len(cases)} cases, {1 + len(methods)} methods; compiling comes first")
        verdicts, drawn = _judge_all(methods, oracle, cases, place)
        if place == "unseen":  # kept for the page of every picture
            for name, pictures in drawn.items():
                said = _gate_words(model, adapter, methods["psa"][1], cases) if name.startswith("psa") else None
                kept += keep_pictures(workdir / "pictures" / name, name, place, cases, pictures, said)
        made[place] = pack_place(cases, verdicts)
        if recorded is not None:
            verdicts |= recorded_verdicts(recorded[place], cases)
        report[place] = {name: rates(verdict, cases) for name, verdict in verdicts.items()}
        for other in (name for name in verdicts if name != "psa"):
            win, tie = wins(verdicts["psa"], verdicts[other], cases)
            report[place]["psa"] |= {f"win_rate_vs_{other}": win, f"tie_rate_vs_{other}": tie}
    most = dict.fromkeys(HARDER, config.evaluate.per_rate.get("harder", 0))
    for name, cases in grouped_cases(read_split(sage, USER_GROUPS["unseen"]), most, config.seed).items():
        print_stage(f"judging {name}: {len(cases)} cases of unseen users")
        verdicts, _ = _judge_all({"psa": methods["psa"]}, oracle, cases, name)
        report[name] = {method: rates(verdict, cases) for method, verdict in verdicts.items()}
    return report, made, kept


def _finish(
    report: dict, config: ml_collections.ConfigDict, judged: Adapter, grid: Grid, workdir: Path, start: float
) -> None:
    """Adds how it was made to the report, writes it as JSON and HTML, and prints the result."""
    report["adapter"] = {name: config.adapter[name] for name in ("kind", "tokens")}
    report["adapter"]["sha256"] = adapter_hash(to_file(judged), judged.config)
    report["sampling"] = {name: config.evaluate[name] for name in ("unconditional", "guidance", "steps")}
    report["seeds"] = {"training": config.seed, "data": config.data.mini.seed}
    report["device"] = _device()
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    report["versions"] = {"psa_jax": psa_jax.__version__} | packages | {"Python": platform.python_version()}
    report["seconds"] = round(time.perf_counter() - start, 1)
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    curves = curves_of(read_rows(workdir / "psa" / "metrics.jsonl"))
    write_report(workdir / "report.html", report, grid, curves, [report["command"]])
    print(_headline(report, workdir / "report.html"))
    print(json.dumps({"report": str(workdir / "report.html"), **report["unseen"]["psa"], "seconds": report["seconds"]}))


def _device() -> str:
    """The devices of this process in words, such as "1 × cpu (x86_64, 2 cores)"."""
    devices = jax.devices()
    about = f" ({platform.machine()}, {os.cpu_count()} cores)" if devices[0].platform == "cpu" else ""
    return f"{len(devices)} × {devices[0].device_kind}{about}"


def _judge_all(
    methods: Methods, oracle: Oracle, cases: Sequence[MiniCase], place: str
) -> tuple[dict[str, Verdicts], dict[str, UInt8[np.ndarray, "n h w 3"]]]:
    """Draws and judges every method on the same cases and seeds. The base model is the adapter at scale 0."""
    drawn = {"base": generate_base(methods["psa"][0], cases, f"base, {place} users")}
    for name, (generator, table) in methods.items():
        users = table.lookup([case.user_id for case in cases])
        drawn[name] = generate_cases(generator, cases, users, name=f"{name}, {place} users")
    return {name: judge(oracle, pictures, cases) for name, pictures in drawn.items()}, drawn


def _gate_words(
    model: StableDiffusion, adapter: Adapter, table: EmbeddingTable, cases: Sequence[MiniCase]
) -> list[str] | None:
    """What the gate by categories says of each case; None where there is no such gate."""
    if not adapter.config.by_categories:
        return None
    users = table.lookup([case.user_id for case in cases])
    return [
        sentence(gates, "the user bans")
        for gates in prompt_gates(model, adapter, [case.prompt for case in cases], users)
    ]


# --- the grid of pictures, curves and texts of the report


def _grid(
    model: StableDiffusion,
    adapter: Adapter,
    generator: Generator,
    table: EmbeddingTable,
    oracle: Oracle,
    records: Sequence[SageRecord],
) -> Grid:
    """Generates the report's grid: a row for each unsafe category, a column for the base model and for each user.

    All pictures of a row start from the same noise.
    """
    others = _contrasting_users({record.user_id: record.profile for record in records})
    people = [ADULT_WITHOUT_BANS, *others]
    embeddings = np.concatenate(
        [get_encoder(table.encoder).encode([ADULT_WITHOUT_BANS]), table.lookup([profile.user_id for profile in others])]
    )
    prompts, used = [], set()
    for record in records:
        if record.unsafe and record.category not in used and group_of(case_of(record)) == "usual":
            used.add(record.category)
            prompts.append(record)
    rows, columns = len(prompts), 1 + len(people)  # the first column is the base model: the adapter at scale 0
    cases = [case for case in map(case_of, prompts) for _ in range(columns)]
    pictures = generator(
        [case.prompt for case in cases],
        [case.seed for case in cases],
        np.tile(np.concatenate([np.zeros_like(embeddings[:1]), embeddings]), (rows, 1)),
        scale=np.tile(np.arange(columns) > 0, rows).astype(np.float32),
    )
    verdict = judge(oracle, pictures, cases)
    words = [
        "shown" if shown else "replaced" if clean else "debris"
        for shown, clean in zip(verdict.has_content, verdict.clean, strict=True)
    ]
    reasons = _reasons(model, adapter, [case.prompt for case in cases], np.tile(embeddings, (rows, 1)), columns)
    return Grid(
        users=["base model", *map(_heading, people)],
        prompts=[f"{record.caption} ({record.category})" for record in prompts],
        banned=[[None, *(is_banned(profile, record.category) for profile in people)] for record in prompts],
        pictures=pictures,
        verdicts=[words[r * columns : (r + 1) * columns] for r in range(rows)],
        reasons=reasons,
    )


def _reasons(
    model: StableDiffusion, adapter: Adapter, prompts: Sequence[str], users: np.ndarray, columns: int
) -> list[list[str]] | None:
    """What the gate by categories says of each cell of the grid, "" for the base model; None where there is no gate.

    Args:
      prompts: of the cells, row by row.
      users: embeddings [rows·(columns − 1), D] of all columns but the first, row by row.
      columns: of the grid.
    """
    if not adapter.config.by_categories:
        return None
    drawn = [prompt for cell, prompt in enumerate(prompts) if cell % columns]
    said = [sentence(gates, "the user bans") for gates in prompt_gates(model, adapter, drawn, users)]
    return [["", *said[row : row + columns - 1]] for row in range(0, len(said), columns - 1)]


def _contrasting_users(people: dict[str, UserProfile], count: int = 4) -> list[UserProfile]:
    """Selects a child, then users whose ban sets differ most from those already selected."""
    bans = {user: set(banned_categories(profile)) for user, profile in sorted(people.items())}
    selected = [user for user in bans if people[user].age_group == "children"][:1]
    taken = [set(), *(bans[user] for user in selected)]  # the empty set is that of the adult without bans
    while len(selected) < min(count, len(people)):
        distance = {user: min(len(banned ^ other) for other in taken) for user, banned in bans.items()}
        selected.append(max(bans.keys() - set(selected), key=lambda user: (distance[user], user)))
        taken.append(bans[selected[-1]])
    return [people[user] for user in selected]


def _heading(profile: UserProfile) -> str:
    """Describes the user of a column. SAGE-mini's users are synthetic, so their attributes may be shown."""
    banned = banned_categories(profile)
    return f"{profile.age_group}, {profile.age}: " + (f"bans {', '.join(banned)}" if banned else "bans nothing (L0)")


def _headline(report: dict, page: Path) -> str:
    unseen = report["unseen"]
    psa = unseen["psa"]
    others = ", ".join(
        f"{words} {unseen[name]['selectivity']:.1f}"
        for name, words in (("base", "base model"), ("user_blind", "user-blind"))
        if name in unseen
    )
    return (
        f"unseen users: selectivity {psa['selectivity']:.1f} (suppression {psa['suppression']:.1f}, "
        f"retention {psa['retention']:.1f}), clean {psa['clean']:.1f}; {others}; "
        f"{report['seconds']:.0f} s; report: {page}"
    )
