"""`psa-jax generate`: pictures for a user, from a model folder, an adapter file and a profile or a user id."""

import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, PngImagePlugin

import psa_jax
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, weights_hash
from psa_jax.interop.native import load_adapter, read_metadata
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable


def run(args: Namespace) -> int:
    """Draws one picture a prompt and seed; prints a last line in JSON with their paths."""
    model = load_stable_diffusion(args.model)
    adapter, user = None, None
    if args.adapter is None and (args.profile or args.user):
        raise PSAError("--profile and --user need --adapter; without it the base model draws for nobody in particular")
    if args.adapter is not None:
        about = read_metadata(args.adapter)
        if about.get("base_model", hash_ := weights_hash(model.folder)) != hash_:
            raise PSAError(f"{args.adapter}: the adapter was trained for another base model than {model.folder}")
        adapter = load_adapter(args.adapter, model.unet.config.cross_attentions, model.unet.config.cross_attention_dim)
        user = _user(args, about)
    generator = Generator(
        model,
        adapter,
        steps=args.steps,
        guidance=args.guidance,
        unconditional=args.unconditional,
        size=None if args.size is None else (args.size, args.size),
        batch_size=min(8, len(args.prompt) * args.images),
    )
    prompts = [prompt for prompt in args.prompt for _ in range(args.images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.images)]
    users = None if user is None else np.tile(user, (len(prompts), 1))
    pictures = generator(prompts, seeds, users, negative=args.negative, scale=args.scale)

    args.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        path = args.out / f"{index // args.images:05d}_{seed}.png"
        _write_png(path, picture, {"prompt": prompt, "seed": seed, "steps": args.steps, "guidance": args.guidance})
        paths.append(str(path))
    print(json.dumps({"pictures": paths}))
    return 0


def _user(args: Namespace, about: dict) -> Float[np.ndarray, "1 d"]:
    """The embedding of `--user` from `--table`, or of `--profile` through the adapter's encoder."""
    if bool(args.profile) == bool(args.user):
        raise PSAError("an adapter needs a user: give either --profile JSON or --user ID with --table FILE")
    table = None if args.table is None else EmbeddingTable.load(args.table)
    trained = about.get("encoder_fingerprint")
    if table is not None and trained not in (None, table.fingerprint):
        raise PSAError(
            f"{args.table}: encoded by {table.encoder} ({table.fingerprint}), the adapter was trained with "
            f"{about['encoder']} ({trained}); encode the users again"
        )
    if args.user:
        if table is None:
            raise PSAError("--user needs --table FILE, the embeddings of known users")
        return table.lookup([args.user])
    if trained is None:
        raise PSAError(f"{args.adapter}: does not say which encoder it was trained with; use --user with --table")
    encoder = get_encoder(about["encoder"])
    if encoder.fingerprint != trained:
        raise PSAError(f"{args.adapter}: trained with another version of the encoder {about['encoder']!r} ({trained})")
    if about.get("standardised") and table is None:
        raise PSAError(
            f"{args.adapter}: trained on a standardised table; give it with --table to scale --profile alike"
        )
    raw = encoder.encode([UserProfile.from_json(args.profile)])
    return raw if table is None else table.apply(raw)


def _write_png(path: Path, picture: np.ndarray, about: dict) -> None:
    """A PNG that says how it was made (never for whom), whole or not at all."""
    text = PngImagePlugin.PngInfo()
    text.add_text("psa_jax", json.dumps({**about, "version": psa_jax.__version__}))
    unfinished = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(unfinished, format="PNG", pnginfo=text)
    os.replace(unfinished, path)
