"""`psa-jax evaluate`: what pictures show, by method, and how sure that is. The last line on stdout is JSON."""

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.evaluation.clip_embeddings import ClipEmbeddings
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.embedder import Embedder
from psa_jax.evaluation.inception_embeddings import InceptionEmbeddings
from psa_jax.evaluation.judged_run import PAGE_FILE, RESULT_FILE, judge_part, judge_pictures, require_packages
from psa_jax.evaluation.judges.judge import JudgeSettings, made, make_judge
from psa_jax.evaluation.judges.registry import JUDGES, MEASURES, MODELS, PAIRS
from psa_jax.evaluation.manifest import Pictured, read_manifest
from psa_jax.evaluation.measured import measured, reference_pictures
from psa_jax.evaluation.measures import DISTANCES
from psa_jax.evaluation.pair_wins import compared_pairs
from psa_jax.evaluation.picture_rates import check_baseline
from psa_jax.files import owner_only
from psa_jax.hosts import part_of

_COLUMNS = ("content", "suppression", "retention", "selectivity", "clean", "pass")

_EMBEDDERS: dict[str, Callable[[Path], Embedder]] = {"clip": ClipEmbeddings, "inception": InceptionEmbeddings}
"""Name in `MODELS` → what makes it of the path that its flag gives."""


def run(args: Namespace) -> int:
    """Judges all pictures, prints a table for each judge and writes everything to `result.json`.

    A stopped run goes on: what has been judged is kept in `--out`.

    Raises:
      PSAError: a manifest, picture, judge or baseline that is wrong.
    """
    require_packages()
    part = part_of(args.host, args.hosts)
    names = list(dict.fromkeys(args.judges.split(",")))
    known = [*JUDGES, *PAIRS, *MEASURES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PSAError(f"--with={unknown[0]} is unknown; give some of {', '.join(known)}")
    if {"judge", *PAIRS} <= set(names):
        raise PSAError("judge and judge-pairs have one budget of --requests; ask for one of them in a call")
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
    judges = {name: make_judge(name, settings) for name in names if name in JUDGES}
    measures = [name for name in names if name in MEASURES]
    if part is not None:
        if measures := [name for name in names if name not in JUDGES]:
            raise PSAError(f"{measures[0]} is of all pictures together; leave it to the last call, without --hosts")
        counts = judge_part(listed, judges, args.out, part)
        print(json.dumps({"out": str(args.out), "host": part[0], "hosts": part[1], "verdicts": counts}))
        return 0
    models, reference = _needed(args, measures)
    with owner_only():
        pairs = _pairs(args, names, settings, listed)  # first: what is wrong with it is said before long work
        embeddings = args.out / "embeddings"
        of_all = measured(listed, measures, models, reference, embeddings, args.baseline) if measures else {}
    command = shlex.join(["psa-jax", "evaluate", *args.words])
    result = judge_pictures(listed, judges, args.out, args.baseline, command, of_all, pairs)
    found = result["judges"]
    for name, each in found.items():
        refused = {method: one["refused"] for method, one in each["methods"].items() if one["refused"]}
        if refused:
            print(f"\n{name}: no verdict on {', '.join(f'{n} pictures of {m}' for m, n in refused.items())}: left out")
        print(f"\n{name}: percent with 95 % intervals; content by prompt, the others by user")
        print(_table(each["methods"]))
        for method, outcomes in each["differences"].items():
            print(*_compared(method, args.baseline, outcomes), sep="\n")
    for name, found_pairs in pairs.items():
        print(f"\n{name}: {PAIRS[name].about}; percentage points with 95 % intervals")
        for method, each in found_pairs["methods"].items():
            print(_won(method, args.baseline, each))
    for name in measures:
        print(f"\n{name}: {MEASURES[name].about}")
        for method, each in of_all[name].items():
            print(f"{method}: {_measure(each, args.baseline)}")
    brief = {
        name: {method: each["content"] for method, each in judged["methods"].items()} for name, judged in found.items()
    }
    print(json.dumps({"result": str(args.out / RESULT_FILE), "report": str(args.out / PAGE_FILE), "content": brief}))
    return 0


def _pairs(
    args: Namespace, names: list[str], settings: JudgeSettings, listed: list[tuple[Path, Pictured]]
) -> dict[str, Any]:
    """What compares two methods' pictures found: for each, what it depends on and its numbers by method."""
    found = {}
    for name in (name for name in names if name in PAIRS):
        args.out.mkdir(parents=True, exist_ok=True)
        judge = made(name, PAIRS[name], args.out / f"{name}.jsonl", settings)
        found[name] = {
            "about": dict(judge.about),
            "methods": compared_pairs(listed, args.baseline, judge.preferences),
        }
    return found


def _won(method: str, baseline: str, each: dict[str, Any]) -> str:
    counts = f"wins {each['wins']}, loses {each['losses']}, ties {each['ties']} of {each['pairs']}"
    if "by_users" not in each:
        return f"{method} against {baseline}: {counts}; no verdict on any"
    by = [
        f"{_interval(each[key]['difference'])} by {each[key][key[3:]]} {key[3:]}" for key in ("by_users", "by_prompts")
    ]
    return f"{method} against {baseline}: {counts}; wins less losses {'; '.join(by)}"


def _needed(args: Namespace, measures: list[str]) -> tuple[dict[str, Embedder], list[Path]]:
    """The models that measures need, and the pictures of the reference.

    Raises:
      PSAError: a flag that one of them needs is missing, or not of such a model.
    """
    for name in measures:
        model = MEASURES[name].model
        if getattr(args, model) is None:
            raise PSAError(f"{name} needs {MODELS[model]}")
        if name in DISTANCES and args.reference is None:
            raise PSAError(f"{name} needs --reference, a folder of pictures")
    reference = reference_pictures(args.reference) if DISTANCES.keys() & set(measures) else []
    used = {MEASURES[name].model for name in measures}
    return {model: make(getattr(args, model)) for model, make in _EMBEDDERS.items() if model in used}, reference


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
    between = "" if "interval" not in each else " ({:z.2f} to {:z.2f})".format(*each["interval"])
    less = ""
    if "less_baseline" in each:
        value, low, high = each["less_baseline"]
        less = f"; less {baseline} {value:z.2f} ({low:z.2f} to {high:z.2f}) by {each['less_baseline_prompts']} prompts"
    return f"{each['value']:z.2f}{between} of {each['pictures']} pictures{less}"


def _interval(value: Interval | None) -> str:
    return "–" if value is None else "{:z.1f} ({:z.1f} to {:z.1f})".format(*value)
