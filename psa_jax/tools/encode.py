"""`psa-jax encode`: makes embedding tables, adds users, forgets users. The last line on stdout is JSON."""

import json
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp

from psa_jax.errors import PSAError
from psa_jax.files import check_new
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.profiles.encoders import Encoder, load_encoder
from psa_jax.profiles.population import read_users_csv
from psa_jax.profiles.table import EmbeddingTable


def run(args: Namespace) -> int:
    """Makes a table from users.csv or a folder of the torch original's .npy files, adds users to one, or forgets users.

    Raises:
      PSAError: flags that exclude each other, a missing or existing table, or wrong users.
    """
    if args.forget is not None:
        return _forget(args)
    if args.out is None:
        raise PSAError("give --out FILE, the embedding table to write")
    adding = args.add or args.update
    if adding and args.standardise:
        raise PSAError("--standardise is for a new table: users that are added get the scale that the table has")
    if not adding:
        check_new(args.out, "give another --out, or --add to add these users to that table")
    elif not args.out.exists():
        raise PSAError(f"{args.out}: no embedding table there to add to; leave out --add and --update to make one")
    before = EmbeddingTable.load(args.out) if adding else None
    changed, replies = {}, {}
    if args.source.is_dir():
        table = EmbeddingTable.from_npy_folder(args.source)
    else:
        encoder = _encoder(args)
        if before is not None:
            before.check_encoder(encoder)
        table = EmbeddingTable.from_profiles(read_users_csv(args.source), encoder)
        replies = dict(getattr(encoder, "counts", {}))
    if before is not None:
        new, table = len(table.ids), before.joined(table, update=args.update)
        added = len(table.ids) - len(before.ids)
        changed = {"added": added, "updated": new - added}
    elif args.standardise:
        table = table.standardised()
    table.save(args.out)
    about = {"out": str(args.out), "users": len(table.ids), "dim": table.dim, "encoder": table.fingerprint}
    print(json.dumps(about | changed | ({"replies": replies} if replies else {})))
    return 0


def _encoder(args: Namespace) -> Encoder:
    given = args.model is not None or args.template is not None or args.ask_model
    if given and ENCODERS[args.encoder].model is None:
        able = ", ".join(name for name, entry in ENCODERS.items() if entry.model is not None)
        raise PSAError(f"--model, --template and --ask-model are for --encoder={able}, not {args.encoder}")
    return load_encoder(
        args.encoder,
        args.model,
        template=args.template,
        pooling=args.pooling,
        ask_model=args.ask_model,
        dtype=jnp.dtype(args.dtype),
        batch_size=args.batch_size,
    )


def _forget(args: Namespace) -> int:
    """Rewrites the table without some users; no trace of them stays in the file."""
    path: Path = args.source
    if args.out is not None or args.add or args.update or args.standardise:
        raise PSAError("--forget changes the table itself: leave out --out, --add, --update and --standardise")
    forgotten = list(dict.fromkeys(args.forget))
    table = EmbeddingTable.load(path).without(*forgotten)
    table.save(path)
    print(json.dumps({"out": str(path), "users": len(table.ids), "forgotten": forgotten}))
    return 0
