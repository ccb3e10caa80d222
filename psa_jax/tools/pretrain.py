"""`psa-jax pretrain`: trains the embedded base model and the oracle, and measures both."""

from argparse import Namespace

from psa_jax.mini.base_model import run_pretraining


def run(args: Namespace) -> int:
    """Runs the command with its flags."""
    run_pretraining(args.config, args.workdir)
    return 0
