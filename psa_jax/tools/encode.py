"""`psa-jax encode`: users to an embedding table, and one user out of it again. The last line on stdout is JSON."""

import json
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp

from psa_jax.errors import PSAError
from psa_jax.profiles.encoders import Encoder, get_encoder
from psa_jax.profiles.population import read_users_csv
from psa_jax.profiles.table import EmbeddingTable


def run(args: Namespace) -> int:
    """Writes a table from a users.csv or a folder of the torch original's .npy files, or forgets a user."""
    if args.forget is not None:
        return _forget(args)
    if args.out is None:
        raise PSAError("give --out FILE, the embedding table to write")
    counts = {}
    if args.source.is_dir():
        table = EmbeddingTable.from_npy_folder(args.source)
    else:
        encoder = _encoder(args)
        table = EmbeddingTable.from_profiles(read_users_csv(args.source), encoder)
        counts = dict(getattr(encoder, "counts", {}))
    table = table.standardised() if args.standardise else table
    table.save(args.out)
    about = {"out": str(args.out), "users": len(table.ids), "dim": table.dim, "encoder": table.fingerprint}
    print(json.dumps(about | ({"replies": counts} if counts else {})))
    return 0


def _encoder(args: Namespace) -> Encoder:
    if args.encoder != "qwen":
        if args.model is not None or args.template is not None or args.ask_model:
            raise PSAError(f"--model, --template and --ask-model are for --encoder=qwen, not {args.encoder}")
        return get_encoder(args.encoder)
    if args.model is None:
        raise PSAError("--encoder=qwen needs --model DIR, a Qwen2.5 folder in transformers' layout")
    from psa_jax.profiles.qwen_encoder import load_qwen_encoder  # imported late: brings the language model

    return load_qwen_encoder(
        args.model,
        template=args.template,
        pooling=args.pooling,
        ask_model=args.ask_model,
        dtype=jnp.dtype(args.dtype),
        batch_size=args.batch_size,
    )


def _forget(args: Namespace) -> int:
    """Rewrites the table without one user; nothing of the user stays in the file."""
    path: Path = args.source
    if args.out is not None:
        raise PSAError("--forget changes the table itself: leave out --out")
    table = EmbeddingTable.load(path).without(args.forget)
    table.save(path)
    print(json.dumps({"out": str(path), "users": len(table.ids), "forgotten": 1}))
    return 0
