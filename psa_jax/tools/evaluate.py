"""`psa-jax evaluate`: what pictures show, by method, and how sure that is. The last line on stdout is JSON."""

import importlib.util
import json
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psa_jax
from psa_jax.errors import PSAError
from psa_jax.evaluation.clip_embeddings import ClipEmbeddings
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.judged_page import Shown, write_judged_page
from psa_jax.evaluation.judges.judge import Judge, JudgeSettings, make_judge
from psa_jax.evaluation.judges.registry import JUDGES, MEASURES
from psa_jax.evaluation.manifest import Pictured, read_manifest
from psa_jax.evaluation.measured import measured, reference_pictures
from psa_jax.evaluation.picture_rates import (
    Judged,
    by_slice,
    by_user,
    check_baseline,
    content_shares,
    differences,
    personal_rates,
    with_holm,
)
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.evaluation.readings import Readings
from psa_jax.files import owner_only, write_private
from psa_jax.progress import print_stage

RESULT_FILE, PAGE_FILE = "result.json", "report.html"
_COLUMNS = ("content", "suppression", "retention", "selectivity", "clean", "pass")


def run(args: Namespace) -> int:
    """Judges all pictures, prints a table for each judge and writes everything to `result.json`.

    A stopped run goes on: what has been judged is kept in `--out`.

    Raises:
      PSAError: a manifest, picture, judge or baseline that is wrong.
    """
    if importlib.util.find_spec("statsmodels") is None:
        raise PSAError("psa-jax evaluate compares with statsmodels: pip install 'psa_jax[eval]'")
    names = list(dict.fromkeys(args.judges.split(",")))
    unknown = [name for name in names if name not in {*JUDGES, *MEASURES}]
    if unknown:
        raise PSAError(f"--with={unknown[0]} is unknown; give some of {', '.join([*JUDGES, *MEASURES])}")
    listed = list(_listed(args))
    methods = list(dict.fromkeys(each.method for _, each in listed))
    if len(methods) > 1:
        check_baseline(methods, args.baseline)
    settings = JudgeSettings(
        args.clip,
        args.q16_prompts,
        args.judge_model,
        args.requests,
        args.per_minute,
        args.judge_timeout,
        args.judge_workers,
    )
    judges = {name: make_judge(name, settings) for name in names if name not in MEASURES}
    measures, reference = _measures(args, [name for name in names if name in MEASURES])
    with owner_only():
        args.out.mkdir(parents=True, exist_ok=True)
        judged = {name: _judge(name, judge, listed, args) for name, judge in judges.items()}
        embeddings = args.out / "embeddings"
        of_all = (
            measured(listed, measures, ClipEmbeddings(args.clip), reference, embeddings, args.baseline)
            if measures
            else {}
        )
    found = {name: each for name, (each, _) in judged.items()}
    result = {
        "psa_jax": psa_jax.__version__,
        "baseline": args.baseline,
        "pictures": len({path for path, _ in listed}),
        "judges": found,
        "measures": of_all,
    }
    write_private(args.out / RESULT_FILE, json.dumps(result, indent=1, allow_nan=False) + "\n")
    shown = Shown(
        listed,
        {name: verdicts for name, (_, verdicts) in judged.items()},
        {name: judge.sees for name, judge in judges.items()},
    )
    page = args.out / PAGE_FILE
    write_judged_page(page, result, shown, shlex.join(["psa-jax", "evaluate", *args.words]))
    for name, each in found.items():
        refused = {method: one["refused"] for method, one in each["methods"].items() if one["refused"]}
        if refused:
            print(f"\n{name}: no verdict on {', '.join(f'{n} pictures of {m}' for m, n in refused.items())}: left out")
        print(f"\n{name}: percent with 95 % intervals; content by prompt, the others by user")
        print(_table(each["methods"]))
        for method, outcomes in each["differences"].items():
            print(*_compared(method, args.baseline, outcomes), sep="\n")
    for name in measures:
        print(f"\n{name}: {MEASURES[name]}")
        for method, each in of_all[name].items():
            print(f"{method}: {_measure(each, args.baseline)}")
    brief = {
        name: {method: each["content"] for method, each in judged["methods"].items()} for name, judged in found.items()
    }
    print(json.dumps({"result": str(args.out / RESULT_FILE), "report": str(page), "content": brief}))
    return 0


def _measures(args: Namespace, names: list[str]) -> tuple[list[str], list[Path]]:
    """The measures that are wanted, and the pictures of the reference.

    Raises:
      PSAError: a flag that one of them needs is missing.
    """
    if names and args.clip is None:
        raise PSAError(f"{names[0]} needs --clip, a local folder of a CLIP model in transformers' layout")
    distances = [name for name in names if name != "clip"]
    if distances and args.reference is None:
        raise PSAError(f"{distances[0]} needs --reference, a folder of pictures")
    return names, reference_pictures(args.reference) if distances else []


def _listed(args: Namespace) -> Iterator[tuple[Path, Pictured]]:
    """All pictures of all manifests.

    Raises:
      PSAError: a manifest is wrong, or two folders have pictures of one method, prompt, seed and user.
    """
    if args.manifest is not None and len(args.pictures) > 1:
        raise PSAError("--manifest is of a single folder; put a manifest.csv into each of several folders")
    seen: dict[tuple[str, str, int, str], Path] = {}
    facts: dict[tuple[str, int, str], tuple[Path, tuple]] = {}
    for folder in args.pictures:
        for each in read_manifest(folder, args.manifest):
            key = each.method, each.prompt_id, each.seed, each.user_id
            if key in seen:
                raise PSAError(
                    f"{folder} and {seen[key]}: both have a picture of one method, prompt, seed and user; name the "
                    "methods differently in their manifests (psa-jax generate --method)"
                )
            seen[key] = folder
            where, said = facts.setdefault(key[1:], (folder, (each.category, each.unsafe, each.banned)))
            if said != (each.category, each.unsafe, each.banned):
                raise PSAError(
                    f"{where} and {folder}: say different things of one prompt, seed and user (category, unsafe, "
                    "banned); make both manifests of one list of prompts"
                )
            yield folder / each.file, each


def _judge(
    name: str, judge: Judge, listed: list[tuple[Path, Pictured]], args: Namespace
) -> tuple[dict[str, Any], Verdicts]:
    """What the result says of one judge, and its verdicts on all pictures."""
    readings = Readings(args.out / f"{name}.jsonl", judge)
    pictures = [each for _, each in listed]
    print_stage(f"{name}: {len(pictures)} lines of manifests, {len(readings)} verdicts there already")
    verdicts = readings.judged([path for path, _ in listed], [each.case for each in pictures], name)
    whole = Judged(pictures, verdicts, judge.sees)
    judged = whole.said()
    methods, compared = {}, {}
    for method in whole.methods:
        part = judged.part(lambda each, method=method: each.method == method)
        methods[method] = {
            "content": content_shares(part),
            "rates": personal_rates(part),
            "slices": by_slice(part),
            "users": by_user(part),
            "refused": sum(each.method == method for each in pictures) - len(part.pictures),
        }
        if method != args.baseline:
            compared[method] = differences(judged, method, args.baseline)
    with_holm([test for outcomes in compared.values() for test in outcomes.values()])
    said = {"about": dict(judge.about), "sees": sorted(judge.sees), "methods": methods, "differences": compared}
    return said, verdicts


def _table(methods: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, [*methods, "method"]))
    lines = [f"{'method':{width}}  " + "  ".join(f"{name:21}" for name in _COLUMNS).rstrip() + "  users  prompts"]
    for method, each in methods.items():
        unsafe, rates = each["content"]["unsafe"], each["rates"] or {}
        cells = [unsafe and unsafe["share"], *(rates.get(name) for name in _COLUMNS[1:])]
        counts = f"{rates.get('users', 0):5d}  {unsafe['prompts'] if unsafe else 0:7d}"
        lines.append(f"{method:{width}}  " + "  ".join(f"{_interval(cell):21}" for cell in cells) + f"  {counts}")
    return "\n".join(lines)


def _compared(method: str, baseline: str, outcomes: dict[str, Any]) -> Iterator[str]:
    for name, each in outcomes.items():
        by = [
            f"{_interval(each[key]['difference'])} by {each[key][key[3:]]} {key[3:]}"
            for key in ("by_users", "by_prompts")
            if key in each
        ]
        won, lost = each["only_ours"], each["only_theirs"]
        counts = f"wins {won}, loses {lost}, ties {each['pictures'] - won - lost}"
        yield f"{method} less {baseline}, {name}: {'; '.join(by)}; {counts}, Holm's p {each['holm_p']:.2g}"


def _measure(each: dict[str, Any], baseline: str) -> str:
    between = "" if "interval" not in each else " ({:.2f} to {:.2f})".format(*each["interval"])
    less = ""
    if "less_baseline" in each:
        value, low, high = each["less_baseline"]
        less = f"; less {baseline} {value:.2f} ({low:.2f} to {high:.2f}) by {each['less_baseline_prompts']} prompts"
    return f"{each['value']:.2f}{between} of {each['pictures']} pictures{less}"


def _interval(value: Interval | None) -> str:
    return "–" if value is None else "{:.1f} ({:.1f} to {:.1f})".format(*value)
