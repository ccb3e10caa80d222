"""The flags of `psa-jax sweep`. Imports nothing heavy, as `psa_jax.tools.arguments`."""

from argparse import ArgumentParser

from psa_jax.tools.arguments import base_model_of_config, experiment
from psa_jax.tools.flags import count, path, seed

LAUNCHERS = {
    "print": "only the commands, one a line",
    "local": "processes of this machine",
    "slurm": "launch/slurm.sbatch",
    "jobset": "launch/gke.py",
    "sky": "sky jobs launch launch/sky.yaml",
}
"""Name → what trains the points (`psa_jax.sweeps.launchers` gives them to it)."""


def points(parser: ArgumentParser) -> None:
    """Flags of `psa-jax sweep`."""
    experiment(parser)
    base_model_of_config(parser)
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="",
        required=True,
        metavar="NAME,…",
        help="generators sweep_NAME of the configuration's file or of configs/sweeps: a,b all pairs, a+b one by one; "
        "without a name the file's sweep()",
    )
    ways = "; ".join(f"{name}: {about}" for name, about in LAUNCHERS.items())
    parser.add_argument("--launcher", choices=list(LAUNCHERS), default="local", help=f"{ways} (default: local)")
    parser.add_argument(
        "--launcher-args", default="", metavar="FLAGS", help="slurm, jobset, sky: their flags; {name} is the point's"
    )
    parser.add_argument(
        "--prepare", choices=["data", "all"], help="only make what the points share: data, or reference errors, too"
    )
    here = parser.add_argument_group("local")
    here.add_argument("--jobs", type=count, default=1, metavar="N", help="points at a time (default: 1)")
    here.add_argument("--cores", type=count, metavar="N", help="CPU cores of each point (default: they share all)")
    search = parser.add_argument_group("search", "local; the values of each generator are the choices")
    search.add_argument("--search", choices=["optuna"], help="try points that promise much, not all of them")
    search.add_argument("--trials", type=count, metavar="N", help="how many points, those of earlier calls included")
    search.add_argument("--search-seed", type=seed, default=0, metavar="SEED", help="of the search (default: 0)")
    metric(search)


def metric(group) -> None:
    """Flags that say which point is best."""
    group.add_argument(
        "--metric", default="loss", help="of metrics.jsonl, such as held_out_accuracy (default: %(default)s)"
    )
    group.add_argument("--best", choices=["max", "min"], help="which is best (default: min of a loss, else max)")


def report(parser: ArgumentParser) -> None:
    """Flags of `psa-jax sweep report`."""
    parser.add_argument("workdir", type=path, metavar="WORKDIR", help="folder of a psa-jax sweep")
    metric(parser)
