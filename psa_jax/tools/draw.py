"""`psa-jax population` and `psa-jax mini`: what is drawn without a model. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.data.mini import draw_mini
from psa_jax.files import check_new
from psa_jax.profiles.population import sample_population, write_users_csv


def population(args: Namespace) -> int:
    """Writes users.csv."""
    check_new(args.out, "give another --out, or remove it first")
    write_users_csv(args.out, sample_population(args.n, args.seed))
    print(json.dumps({"users": args.n, "seed": args.seed, "out": str(args.out)}))
    return 0


def mini(args: Namespace) -> int:
    """Writes SAGE-mini."""
    counts = draw_mini(args.out, args.users, args.seed)
    print(json.dumps({"out": str(args.out), "rows": counts}))
    return 0
