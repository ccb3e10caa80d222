"""`psa-jax population`: samples user profiles. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.files import check_new
from psa_jax.profiles.population import sample_population, write_users_csv


def run(args: Namespace) -> int:
    """Writes users.csv."""
    check_new(args.out, "give another --out, or remove it first")
    write_users_csv(args.out, sample_population(args.n, args.seed))
    print(json.dumps({"users": args.n, "seed": args.seed, "out": str(args.out)}))
    return 0
