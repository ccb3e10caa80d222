"""`psa-jax doctor`: what this machine, and a configuration on it, lack for a training, and what mends it."""

import json
from argparse import Namespace

from psa_jax.training.diagnosis import Setting, diagnose


def run(args: Namespace) -> int:
    """Prints a line for each check and, last, all of them as JSON. Returns 1 if something is missing."""
    found = diagnose(Setting(args.config, args.workdir))
    width = max(len(each.name) for each in found)
    for each in found:
        print(f"{'ok ' if each.well else 'NOT'}  {each.name:{width}}  {each.said}")
    missing = [each.name for each in found if not each.well]
    print(json.dumps({"missing": missing, "checks": {each.name: each.said for each in found}}))
    return 1 if missing else 0
