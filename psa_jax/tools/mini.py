"""`psa-jax mini`: renders SAGE-mini. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.mini.dataset import render_mini


def run(args: Namespace) -> int:
    """Writes the folder and prints the rows of each split."""
    counts = render_mini(args.out, args.users, args.seed, paraphrase=args.paraphrase)
    print(json.dumps({"out": str(args.out), "rows": counts}))
    return 0
