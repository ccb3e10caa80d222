"""`psa-jax generate`: pictures for a user, from a model folder, an adapter file and a profile or a user id."""

import dataclasses
import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, PngImagePlugin

import psa_jax
from psa_jax.data.fingerprints import vae_fingerprint
from psa_jax.data.preprocess import Preprocess
from psa_jax.diffusion.concept_editing import Replacement, edit_concepts, read_replacements
from psa_jax.diffusion.conditioning import prompt_gates
from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.scheduler_config import sampler_name
from psa_jax.diffusion.sld_strengths import CONCEPT
from psa_jax.errors import PSAError
from psa_jax.evaluation.gate_words import sentence
from psa_jax.evaluation.manifest import ASKED, MANIFEST, Pictured, read_manifest, write_manifest
from psa_jax.files import PRIVATE, PUBLIC, replacing, write_private
from psa_jax.interop.adapter_file import adapter_hash, find_adapter, read_metadata
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion, check_text
from psa_jax.interop.lora import lora_hash
from psa_jax.interop.native import load_adapter, to_file
from psa_jax.json_input import parse_json, read_json
from psa_jax.models.adapter import Adapter
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.progress import Progress, print_on_main, print_stage
from psa_jax.seeds import PICTURE_BITS, check_seed
from psa_jax.tools.prompts import read_prompts


def run(args: Namespace) -> int:
    """Generates one picture for each prompt and seed; the last line on stdout is JSON with the paths.

    A stopped run continues: complete pictures in the folder are not generated again.

    Raises:
      PSAError: the first wrong flag, or a folder with pictures of other settings, weights or users.
    """
    wanted, listed = _wanted(args)
    _check_flags(args)
    replacements = None if args.uce is None else read_replacements(args.uce)
    trained = None if args.adapter is None else find_adapter(args.adapter)
    # Before the weights are read, which takes long: a user may be wrong.
    users = None if trained is None else _embeddings(trained, args, [user for _, user in wanted])
    model = BaseModel.from_config(vars(args)).load(
        dtype=jnp.dtype(args.dtype), lora=args.lora, lora_scale=args.lora_scale
    )
    if replacements is not None:
        model = edit_concepts(model, replacements)
    adapter = None if trained is None else _adapter(trained, model)
    batch = min(args.batch_size, len(wanted))
    generator = Generator(
        model,
        adapter,
        steps=args.steps,
        guidance=args.guidance,
        rescale=args.guidance_rescale,
        sampler=args.sampler,
        eta=args.eta,
        karras=True if args.karras else None,
        unconditional=args.unconditional,
        size=args.size,
        batch_size=batch,
        sld=args.sld,
    )
    settings = _settings(args, model, generator, replacements)
    _claim(args, settings | _contents(args, model, adapter), users)
    cut = generator.truncated([text for picture, _ in wanted for text in (picture.prompt, picture.negative or "")])
    truncated = len(cut)
    secret = any(each.user_id for each in listed) and not args.user
    # A list with users may write their bans into prompts.
    if secret and cut:
        cut = [f"{len(cut)} prompts are longer than the text encoder reads; the rest is left out"]
    for line in cut:
        print_on_main(line)
    before = read_manifest(args.out, gone=True) if (args.out / MANIFEST).exists() else []
    listed = _with_gates(listed, [picture for picture, _ in wanted], users, model, adapter, args.scale, batch)
    missing = [index for index, (picture, _) in enumerate(wanted) if not _is_whole(args.out / picture.name, picture)]
    if missing:
        print_stage(f"generating {len(missing)} of {len(wanted)} pictures; compiling comes first")
    with Progress(len(missing), "picture", "generating") as progress:
        for start in range(0, len(missing), batch):
            rows = missing[start : start + batch]
            part = [wanted[row][0] for row in rows]
            pictures = generator(
                [picture.prompt for picture in part],
                [picture.seed for picture in part],
                None if users is None else users[rows],
                negative=[picture.negative for picture in part],
                scale=args.scale,
                concept=args.sld_concept,
            )
            for pixels, picture in zip(pictures, part, strict=True):
                about = {**picture._asdict(), **settings}
                _write_png(args.out / picture.name, pixels, about, PRIVATE if secret else PUBLIC)
            progress.step(len(part))
    write_manifest(args.out, [*(each for each in before if _key(each) not in {_key(new) for new in listed}), *listed])
    paths = [str(args.out / picture.name) for picture, _ in wanted]
    print(json.dumps({"pictures": paths, "drawn": len(missing), "truncated": truncated}))
    return 0


def _check_flags(args: Namespace) -> None:
    """Checks flags that need or exclude each other.

    Raises:
      PSAError: the first that does not fit.
    """
    for_users = args.profile or args.user or args.table or args.scale != 1.0 or args.unconditional != "off"
    if args.adapter is None and for_users:
        raise PSAError(
            "--profile, --user, --table, --scale and --unconditional need --adapter; the base model alone "
            "generates the same pictures for every user"
        )
    if args.sld_concept is not None and (args.sld is None or not args.sld_concept.strip()):
        raise PSAError("--sld-concept is a text that says something, and needs --sld, such as --sld=strong")
    if args.uce is not None and args.adapter is not None:
        raise PSAError("--uce edits the base model, and an adapter was trained on another; leave one of the two out")
    check_text(args.sld_concept or "", "--sld-concept", "the terminal must send UTF-8")


def _settings(
    args: Namespace, model: StableDiffusion, generator: Generator, replacements: list[Replacement] | None
) -> dict[str, Any]:
    """What the pictures depend on beside weights, users, prompts and seeds."""
    settings = {
        "sampler": args.sampler or sampler_name(model.scheduler_config),
        **{name: getattr(args, name) for name in ("steps", "guidance", "guidance_rescale", "eta", "karras")},
        "size": generator.size,
        "version": psa_jax.__version__,
    }
    if args.sld:
        settings |= {"sld": args.sld, "sld_concept": args.sld_concept or CONCEPT}
    if replacements is not None:
        settings["uce"] = hashlib.sha256(json.dumps(replacements).encode()).hexdigest()
    return settings


class _Picture(NamedTuple):
    """A picture to generate."""

    name: str
    prompt: str
    negative: str | None
    seed: int


def _wanted(args: Namespace) -> tuple[list[tuple[_Picture, str]], list[Pictured]]:
    """Every prompt with each of its seeds, and a file name that depends only on them.

    Returns:
      The pictures to draw, each with the id of its user in the file of prompts, or ""; and the lines of the manifest.
      A base model draws one picture for all users of a prompt.
    """
    found: dict[tuple, tuple[_Picture, str]] = {}
    listed: dict[tuple[str, str, int, str], Pictured] = {}
    check_text(args.negative or "", "--negative", "the terminal must send UTF-8; or give --prompts FILE.csv with it")
    method = args.method or "uce" * bool(args.uce) or f"sld-{args.sld}" * bool(args.sld)
    method = method or ("base" if args.adapter is None else "psa")
    for index, prompt in enumerate(read_prompts(args)):
        negative = args.negative if prompt.negative is None else prompt.negative
        first = args.seed if prompt.seed is None else prompt.seed
        check_seed(first + args.images - 1, f"seed {first} with --images {args.images}: the last seed", PICTURE_BITS)
        facts = dict(prompt.facts or {})
        owner = facts.get("user_id") or ""
        asked = facts.pop(ASKED, "") or prompt.text
        facts["prompt_id"] = facts.get("prompt_id") or hashlib.sha256(asked.encode()).hexdigest()[:12]
        facts["user_id"] = owner or args.user or ""
        drawn_for = owner if args.adapter is not None else ""
        for seed in range(first, first + args.images):
            new = _Picture(f"{index:05d}_{seed}.png", prompt.text, negative, seed)
            # The users of one prompt share what does not depend on them; a prompt that is there twice is drawn twice.
            key = (prompt.text, negative, seed, drawn_for) if owner else new
            picture, _ = found.setdefault(key, (new, drawn_for))
            line = Pictured(file=picture.name, method=method, prompt=asked, seed=seed, **facts)
            known = listed.setdefault(_key(line), line)
            if dataclasses.replace(known, file=line.file) != line:
                raise PSAError(
                    f"{args.prompts}: a prompt is there twice with one seed and user, and its lines say different "
                    "things of it; remove one of them"
                )
    return list(found.values()), list(listed.values())


def _embeddings(trained: Path, args: Namespace, users: list[str]) -> Float[np.ndarray, "n d"]:
    """The embedding of each picture's user.

    Raises:
      PSAError: some prompts of a file name a user and others do not, or both they and a flag do.
    """
    about = read_metadata(trained)
    if not any(users):
        one = user_embedding(trained, about, profile=args.profile, user=args.user, table=args.table)
        return np.tile(one, (len(users), 1))
    if args.profile or args.user or not all(users):
        raise PSAError(
            f"{args.prompts}: names users by user_id; name one in each line, without --profile, --user and --prompt"
        )
    if args.table is None:
        raise PSAError(f"{args.prompts}: names users by user_id, and that needs --table FILE, their embeddings")
    table = EmbeddingTable.load(args.table)
    missing = set(users) - set(table.ids)
    if missing:  # counted, not named: who uses it is nobody else's matter
        raise PSAError(
            f"{args.table}: lacks {len(missing)} of the users in {args.prompts}; encode them (psa-jax encode --add)"
        )
    user_embedding(trained, about, profile=None, user=users[0], table=args.table)  # checks the table
    return table.lookup(users)


def _adapter(path: Path, model: StableDiffusion) -> Adapter:
    model.require_base_of(path, read_metadata(path))
    return load_adapter(path, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)


def _with_gates(
    listed: list[Pictured],
    pictures: list[_Picture],
    users: Float[np.ndarray, "n d"] | None,
    model: StableDiffusion,
    adapter: Adapter | None,
    scale: float,
    batch: int,
) -> list[Pictured]:
    """The lines of the manifest, which say what an adapter with a gate by categories replaces in their picture."""
    if users is None or adapter is None or not adapter.config.by_categories or scale == 0.0:
        return listed
    said = {}
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        gates = prompt_gates(model, adapter, [picture.prompt for picture in part], users[start : start + batch])
        said |= {picture.name: sentence(row, "the user bans") for picture, row in zip(part, gates, strict=True)}
    return [dataclasses.replace(line, gate=said[line.file]) for line in listed]


def _contents(args: Namespace, model: StableDiffusion, adapter: Adapter | None) -> dict[str, str | None]:
    """Hashes of everything that the pictures depend on. Paths would not do: the file behind one can change."""
    configs = [repr(part.config) for part in (model.unet, model.vae, *model.text_encoders)]
    described = json.dumps([configs, model.scheduler_config, model.force_zeros_for_empty_prompt], sort_keys=True)
    return {
        "model": model.base_hash,
        "model_config": hashlib.sha256(described.encode()).hexdigest(),
        # Preprocess is for pictures that are read; generation reads none.
        "vae": vae_fingerprint(model.vae_tensors or {}, Preprocess(1)),
        "adapter": None if adapter is None else adapter_hash(to_file(adapter), adapter.config),
        "lora": None if args.lora is None else lora_hash(args.lora),
    }


def _claim(args: Namespace, settings: dict, users: np.ndarray | None) -> None:
    """Writes the settings into a new folder, or checks that an existing folder has the same settings and users."""
    # Private: who can guess a profile can compare its digest. One user for all pictures is one row, as ever.
    distinct = None if users is None else users[:1] if (users == users[0]).all() else users
    digest = None if distinct is None else hashlib.sha256(np.float32(distinct).tobytes()).hexdigest()
    text = {name: getattr(args, name) for name in ("dtype", "variant", "lora_scale", "scale", "unconditional")}
    now = json.loads(json.dumps({**text, **settings, "user": digest}))
    path = args.out / ".settings.json"
    if path.is_file():
        before = read_json(path)
        different = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        if different:
            raise PSAError(f"{args.out}: holds pictures of other settings ({', '.join(different)}); give another --out")
        return
    if args.out.is_dir() and any(args.out.glob("*.png")):
        raise PSAError(f"{args.out}: holds pictures of another program; give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_private(path, json.dumps(now, indent=1).encode())


def _is_whole(path: Path, picture: _Picture) -> bool:
    """Whether the picture exists and can be decoded; raises if it was generated from another prompt or seed."""
    if not path.exists():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.text.get("psa_jax", "{}")
    except (OSError, SyntaxError, ValueError):  # Pillow raises any of these for a truncated or damaged file
        return False
    about = parse_json(text, f"{path}: its text")
    if any(about.get(name) != value for name, value in picture._asdict().items()):
        raise PSAError(f"{path}: is a picture of another prompt or seed; give another --out")
    return True


def _key(each: Pictured) -> tuple[str, str, int, str]:
    return each.method, each.prompt_id, each.seed, each.user_id


def _write_png(path: Path, picture: np.ndarray, about: dict, mode: int) -> None:
    """A PNG that says how it was made (never for whom), whole or not at all."""
    text = PngImagePlugin.PngInfo()
    text.add_text("psa_jax", json.dumps(about))
    with replacing(path, mode) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=text)
