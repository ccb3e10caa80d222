"""`psa-jax build`: encodes a SAGE folder as shards for a base model. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.data.model_shards import build_for_model
from psa_jax.data.shards import read_info
from psa_jax.hosts import part_of
from psa_jax.interop.base_model import EMBEDDED, BaseModel
from psa_jax.progress import print_stage


def run(args: Namespace) -> int:
    """Makes the shards, or encodes one host's part of them."""
    part = part_of(args.host, args.hosts)
    print_stage(f"reading {args.model}, then every row and picture of {args.sage_dir}, before the first is encoded")
    model = BaseModel.from_config(vars(args)).load()
    folder = build_for_model(
        model,
        args.sage_dir,
        args.out,
        resolution=args.resolution or model.square_side,
        family="tiny" if args.model == EMBEDDED else model.family,
        flips=args.flips,
        text=args.text_embeddings,
        batch_size=args.batch_size,
        threads=args.threads,
        part=part,
    )
    if part is not None:
        print(json.dumps({"parts": str(folder), "host": part[0], "hosts": part[1]}))
        return 0
    info = read_info(folder)
    about = {name: info[name] for name in ("fingerprint", "splits", "pictures", "flips")}
    print(json.dumps({"out": str(folder), "config": f"{info['family']}_{info['resolution']}", **about}))
    return 0
