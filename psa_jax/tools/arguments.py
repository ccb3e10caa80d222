"""The flags of every command, in one file that imports nothing heavy: `psa-jax COMMAND --help` must answer at once."""

from argparse import ArgumentParser
from pathlib import Path


def population(parser: ArgumentParser) -> None:
    """Flags of `psa-jax population`."""
    parser.add_argument("--n", type=int, default=1000, help="number of users (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2025, help="2025 gives the users released with SAGE (the default)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the users.csv to write (mode 0600)")


def mini(parser: ArgumentParser) -> None:
    """Flags of `psa-jax mini`."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write; absent or empty")
    parser.add_argument("--users", type=int, default=200, help="train users (default: 200); other splits in proportion")
    parser.add_argument("--seed", type=int, default=0, help="seed of concepts, scenes and captions (default: 0)")


def experiment(parser: ArgumentParser) -> None:
    """Flags of the commands that take a config file: pretrain, train. The command gets `config` as a ConfigDict."""
    # With takes_config the command line collects --config.KEY=VALUE too and reads the file (psa_jax.tools.configs).
    parser.set_defaults(takes_config=True)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config([ARG])")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.epilog = "--config.KEY=VALUE sets any value of the config, such as --config.seed=1."
