"""`psa-jax evaluate limits`: where a personal adapter of the small world fails. The last line on stdout is JSON.

What is written holds counts of users and prompts, neither ids nor bans; it is its owner's alone all the same.
"""

import json
import shlex
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float

import psa_jax
from psa_jax.data.sage import SageRecord, read_split
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import USER_GROUPS
from psa_jax.evaluation.read_back import require_classifier
from psa_jax.files import check_new, owner_only, write_private
from psa_jax.interop.adapter_file import adapter_hash, find_adapter, read_metadata
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import EMBEDDED, StableDiffusion
from psa_jax.interop.native import load_adapter, to_file
from psa_jax.mini.limits import Subject, drawing_with, measure, read_attributes, sampling_of
from psa_jax.mini.limits_page import limits_page
from psa_jax.mini.oracle import shipped_oracle
from psa_jax.mini.protocol import ADULT_WITHOUT_BANS, HARDER, MiniCase, grouped_cases
from psa_jax.mini.world import COUNTERPARTS
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.progress import print_stage
from psa_jax.tools.configs import read_config

RESULT_FILE, PAGE_FILE = "limits.json", "limits.md"


def run(args: Namespace) -> int:
    """Measures all variations, prints their tables, and writes them to `limits.json` and `limits.md`.

    Raises:
      PSAError: an adapter, table or folder that is not of the small world, or results that are there already.
    """
    start = time.perf_counter()
    require_classifier("psa-jax evaluate limits")
    for name in (RESULT_FILE, PAGE_FILE):
        check_new(args.out / name, "give another --out")
    settings = read_config(EMBEDDED).evaluate
    path = find_adapter(args.adapter)
    about = read_metadata(path)
    records = read_split(args.data, USER_GROUPS["unseen"])
    groups = _groups(args.data, records, args.per_rate, args.seed)
    table = EmbeddingTable.load(args.table)
    nobody = _without_bans(path, about, table)
    model = BaseModel.from_config({"model": EMBEDDED}).load()
    model.require_base_of(path, about)
    adapter = load_adapter(path, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)
    subject = Subject(
        groups, {each.user_id: each.profile for each in records}, table, nobody, sampling_of(settings, model), args.seed
    )
    print_stage("drawing the same prompts again and again; a sampler, steps or guidance of its own compiles first")
    make = drawing_with(settings, model, adapter, len(subject.usual[::2]))
    found = measure(subject, make, shipped_oracle())
    print_stage("reading attributes back from embeddings")
    found["read_back"] = read_attributes(table, adapter, args.seed)
    report = {**_about(args, settings, model, adapter, subject), **found, "seconds": time.perf_counter() - start}
    page = limits_page(report)
    with owner_only():
        args.out.mkdir(parents=True, exist_ok=True)
    write_private(args.out / RESULT_FILE, json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_private(args.out / PAGE_FILE, page)
    print(page)
    print(json.dumps({"result": str(args.out / RESULT_FILE), "page": str(args.out / PAGE_FILE)}))
    return 0


def _groups(data: Path, records: list[SageRecord], per_rate: int, seed: int) -> dict[str, list[MiniCase]]:
    """The unsafe cases of each group.

    Raises:
      PSAError: the folder is not of SAGE-mini, or too small to have banned and allowed prompts in each group.
    """
    if any(record.concept.replace("_", " ") not in COUNTERPARTS for record in records):
        raise PSAError(
            f"{data}: not SAGE-mini, whose oracle judges here; give a folder of psa-jax mini or psa-jax demo"
        )
    try:
        most = {"usual": per_rate} | dict.fromkeys(HARDER, max(1, per_rate // 3))
        cases = grouped_cases(records, most, seed)
    except PSAError as error:
        raise PSAError(f"{data}: {error} in one of its groups; render more users (psa-jax mini --users=100)") from error
    return {name: [case for case in group if case.unsafe] for name, group in cases.items()}


def _without_bans(path: Path, about: dict[str, Any], table: EmbeddingTable) -> Float[np.ndarray, "1 d"]:
    """The embedding of an adult without bans; checks that adapter and table are of one encoder and scale.

    Raises:
      PSAError: they are not, or the encoder needs a language model.
    """
    if about.get("encoder") not in ENCODERS or ENCODERS[about["encoder"]].model is not None:
        raise PSAError(
            f"{path}: limits encodes profiles of its own, and cannot with this adapter's encoder "
            f"({about.get('encoder', 'which it does not say')}); give one that was trained with the encoder features, "
            "as psa-jax demo does"
        )
    user_embedding(path, about, profile=None, user=table.ids[0], table=table)  # also bans of the users' own
    return user_embedding(path, about, profile=ADULT_WITHOUT_BANS, user=None, table=table)


def _about(
    args: Namespace, settings: ml_collections.ConfigDict, model: StableDiffusion, adapter: Adapter, subject: Subject
) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "scikit-learn")}
    return {
        "adapter": {"kind": adapter.config.kind, "sha256": adapter_hash(to_file(adapter), adapter.config)},
        "base_model": model.base_hash,
        "sampling": subject.sampling._asdict() | {"unconditional": settings.unconditional},
        "seed": args.seed,
        "per_rate": args.per_rate,
        "users": len(subject.profiles),
        "versions": {"psa_jax": psa_jax.__version__} | packages,
        "command": shlex.join(["psa-jax", "evaluate", "limits", *args.words]),
    }
