"""`psa-jax export`: an adapter in one of several formats, each with a model card. The last line on stdout is JSON."""

import contextlib
import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import USER_GROUPS
from psa_jax.files import check_new, owner_only, replacing_folder, write
from psa_jax.interop.adapter_file import (
    ADAPTER_FILE,
    Tensors,
    adapter_hash,
    find_adapter,
    fitting_config,
    read_metadata,
    read_tensors,
    write_native,
)
from psa_jax.interop.baked import bake
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import EMBEDDED, save_stable_diffusion
from psa_jax.interop.ip_adapter import WEIGHT_NAME, to_ip_adapter
from psa_jax.interop.model_card import Terms, model_card, upstream_limit
from psa_jax.interop.native import load_adapter
from psa_jax.interop.upstream import as_published, write_bin
from psa_jax.json_input import read_json
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.gate_file import write_gates
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.progress import print_on_main
from psa_jax.tensor_file import save_tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter to export.

    Attributes:
      path: its native file.
      about: the metadata in it.
      config: kind and sizes.
      tensors: weights by name.
    """

    path: Path
    about: dict[str, Any]
    config: AdapterConfig
    tensors: Tensors


def run(args: Namespace) -> int:
    """Writes an adapter in the format of `args.format`, with a model card beside it.

    Raises:
      PSAError: a wrong flag, an adapter that the format cannot express, or a report of another adapter. Nothing is
        written then.
    """
    check_new(args.out, "give another --out")
    if args.format != "baked" and (args.profile or args.user or args.table or args.scale != 1.0):
        raise PSAError(
            f"--profile, --user, --table and --scale are for --format=baked; an adapter of --format={args.format} is "
            "for all users, whom generate takes"
        )
    embedded = args.model == EMBEDDED
    if embedded and args.base_model:
        raise PSAError(
            f"--model={EMBEDDED} is the model embedded in psa_jax, which is not on the Hugging Face Hub; leave "
            "--base-model out"
        )
    path = find_adapter(args.adapter)
    about = read_metadata(path)
    if not about:
        raise PSAError(
            f"{path}: not a file that psa-jax train wrote; bring it in with psa-jax import {path} --model=DIR "
            "--out=FILE"
        )
    tensors = read_tensors(path)
    source = Source(path, about, fitting_config(path, tensors, about), tensors)
    report = _report(args, source)
    name, write_adapter = FORMATS[args.format]
    # The report's rates are of scale 1. Only the baked format fixes the scale; others take it at generation.
    scale = args.scale if args.format == "baked" else 1.0
    terms = Terms(args.license, args.base_model, embedded)

    def card_text(weights: str) -> str:
        return model_card(source.config, about, args.format, weights, report, scale, terms)

    if args.out.suffix in (".safetensors", ".bin"):
        if name is None:
            raise PSAError(f"{args.out}: --format={args.format} writes a folder; give --out without {args.out.suffix}")
        # Checked before anything is written.
        card, text = _card_path(args.out), card_text(args.out.name)
        write_adapter(source, args.out, args)
        write(card, text)
    else:
        readers = owner_only() if args.format in PERSONAL else contextlib.nullcontext()
        with readers, replacing_folder(args.out) as folder:
            write_adapter(source, folder / (name or ""), args)
            (folder / "README.md").write_text(card_text(name or ""), encoding="utf-8")
    if args.format == "upstream" and (limit := upstream_limit(source.config)):
        print_on_main(f"{args.out}: {limit}")
    result = {"adapter": str(args.out), "format": args.format}
    print(json.dumps(result | {name: getattr(source.config, name) for name in ("kind", "tokens", "user_dim")}))
    return 0


def _card_path(out: Path) -> Path:
    """README.md beside a file; if there is one already, NAME.README.md."""
    card = out.with_name("README.md")
    if os.path.lexists(card):
        card = out.with_name(f"{out.stem}.README.md")
        check_new(card, f"the card of {out.name} would replace it; give another --out, or move it away")
    return card


def _report(args: Namespace, source: Source) -> dict[str, Any] | None:
    """The evaluation report of this adapter: `--report`, or report.json in the run's folder. None if there is none."""
    path = args.report or (args.adapter / "report.json" if args.adapter.is_dir() else None)
    if path is None or (args.report is None and not path.is_file()):
        return None
    report = read_json(path, hint="give the report.json that psa-jax demo wrote")
    for name in ("adapter", "sampling", *USER_GROUPS):
        if not isinstance(report.get(name, {}), dict):
            raise PSAError(f"{path}: {name} is not an object; give a report that psa-jax demo wrote")
    for split in USER_GROUPS:
        for method, rates in report.get(split, {}).items():
            if not isinstance(rates, dict) or not all(type(value) in (int, float) for value in rates.values()):
                raise PSAError(
                    f"{path}: {split}, {method} does not hold rates, which are numbers; give a report that psa-jax "
                    "demo wrote"
                )
    judged, found = report.get("adapter", {}).get("sha256"), adapter_hash(source.tensors, source.config)
    advice = "leave --report out" if args.report else "move it out of the folder"
    if judged is None:
        raise PSAError(
            f"{path}: does not say which adapter it judged (earlier versions wrote no hash); run psa-jax demo again in "
            f"its folder, which reuses the trained adapter, or {advice}"
        )
    if judged != found:
        raise PSAError(
            f"{path}: judged another adapter than {source.path}, whose hash is {found[:16]}…; give this adapter's own "
            f"report, or {advice}"
        )
    return report


# --- formats


def _native(source: Source, path: Path, args: Namespace) -> None:
    write_native(source.tensors, source.config, path, source.about)


def _upstream(source: Source, path: Path, args: Namespace) -> None:
    if source.config.tokens != 1:
        raise PSAError(
            f"{source.path}: the torch original reads 1 token of an adapter, this one has {source.config.tokens}; "
            "export it with --format=native and load it with psa_jax.torch (load_psa)"
        )
    tensors = as_published(source.tensors, source.config, source.path, "upstream")
    if path.suffix == ".bin":
        write_bin(tensors, path)
    else:
        write_native(tensors, dataclasses.replace(source.config, kind="published", qk_dim=None), path, source.about)


def _ip_adapter(source: Source, path: Path, args: Namespace) -> None:
    if path.suffix != ".safetensors":
        raise PSAError(f"{path}: an IP-Adapter is written as .safetensors only")
    tensors = to_ip_adapter(source.tensors, source.config, source.path)
    save_tensors(tensors, path, {"psa": json.dumps(source.about, sort_keys=True)})


def _baked(source: Source, folder: Path, args: Namespace) -> None:
    user = user_embedding(source.path, source.about, profile=args.profile, user=args.user, table=args.table)
    model, adapter = _model(args, source)
    unet = bake(model.unet, adapter, jnp.asarray(user), args.scale)
    save_stable_diffusion(dataclasses.replace(model, unet=unet), folder)


def _diffusers(source: Source, folder: Path, args: Namespace) -> None:
    model, _ = _model(args, source)
    save_stable_diffusion(model, folder)
    about = source.about | ({"base_model": model.base_hash} if "base_model" in source.about else {})
    write_native(source.tensors, source.config, folder / ADAPTER_FILE, about)


def _gates(source: Source, folder: Path, args: Namespace) -> None:
    write_gates(source.tensors, source.config, source.about, folder, source.path)


def _model(args: Namespace, source: Source):
    """Loads the base model, checks that the adapter was trained for it, and loads the adapter."""
    if args.model is None:
        raise PSAError(f"--format={args.format} needs --model=PATH, the adapter's base model")
    model = BaseModel.from_config(vars(args)).load()
    unet = model.unet.config
    adapter = load_adapter(source.path, unet.cross_attentions, unet.cross_attention_dim)
    model.require_base_of(source.path, source.about)
    return model, adapter


FORMATS: dict[str, tuple[str | None, Callable[[Source, Path, Namespace], None]]] = {
    "native": (ADAPTER_FILE, _native),
    "upstream": ("psa_adapter.bin", _upstream),
    "ip-adapter": (WEIGHT_NAME, _ip_adapter),
    "baked": (None, _baked),
    "diffusers": (None, _diffusers),
    "gates": (None, _gates),
}
"""Format -> name of the weight file in a folder (None: the format is a folder), and the function that writes it."""
PERSONAL = ("baked",)
"""Formats whose weights contain one user's preferences. They write folders that only their owner can read."""
