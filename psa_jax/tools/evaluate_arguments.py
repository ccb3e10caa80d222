"""The flags of `psa-jax evaluate`. Imports nothing heavy, as `psa_jax.tools.arguments`."""

from argparse import ArgumentParser

from psa_jax.evaluation.judges.registry import JUDGES, MEASURES, PAIRS
from psa_jax.evaluation.prompt_set_table import PROTOCOLS, REWRITES, SETS
from psa_jax.tools.arguments import base_model, several_hosts
from psa_jax.tools.flags import count, index, path, rate, seed, source, weight


def pictures(parser: ArgumentParser) -> None:
    """Flags of `psa-jax evaluate`."""
    parser.add_argument(
        "pictures", type=source, nargs="+", metavar="PICTURES", help="folders of pictures, each with its manifest.csv"
    )
    judges = "; ".join(f"{name}: {entry.about}" for name, entry in [*JUDGES.items(), *PAIRS.items(), *MEASURES.items()])
    parser.add_argument(
        "--with", dest="judges", required=True, metavar="JUDGE,…", help=f"what reads the pictures: {judges}"
    )
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="folder: verdicts are kept, result.json and report.html are made anew",
    )
    parser.add_argument("--manifest", type=source, metavar="FILE", help="the manifest of a single folder")
    _baseline(parser)
    parser.add_argument(
        "--clip",
        type=source,
        metavar="DIR",
        help="q16, clip, cmmd, fd_clip: local folder of a CLIP model; of q16 ViT-L/14",
    )
    parser.add_argument(
        "--inception", type=source, metavar="FILE", help="fid: pt_inception-2015-12-05-6726825d.pth, or safetensors"
    )
    parser.add_argument("--reference", type=source, metavar="DIR", help="cmmd, fid, fd_clip: folder of pictures")
    parser.add_argument("--q16-prompts", type=source, metavar="FILE", help="q16: its learned prompts, .npy")
    chat = parser.add_argument_group(
        "judge",
        "OPENAI_BASE_URL and OPENAI_API_KEY say where it is; pictures and prompts go there, with judge-pairs what the "
        "user bans, never who it is",
    )
    chat.add_argument("--judge-model", metavar="NAME", help="the vision-language model")
    chat.add_argument(
        "--requests",
        type=index,
        default=0,
        metavar="N",
        help="the most requests to make (default: 0, and it says how many are needed)",
    )
    chat.add_argument("--per-minute", type=count, metavar="N", help="the most requests a minute (default: no limit)")
    chat.add_argument("--judge-timeout", type=rate, default=60.0, metavar="S", help="seconds for one (default: 60)")
    chat.add_argument("--judge-workers", type=count, default=4, metavar="N", help="how many at once (default: 4)")

    several_hosts(parser, "each judges a part; a last call without these judges what is missing and writes the result")


def _baseline(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", default="base", metavar="NAME", help="method that others are compared with (default: base)"
    )


def prompts(parser: ArgumentParser) -> None:
    """Flags of `psa-jax evaluate prompts`."""
    parser.add_argument("set", choices=["sage", *SETS], help="the set")
    parser.add_argument("source", type=source, metavar="SOURCE", help="its CSV file; of sage its folder")
    parser.add_argument("--out", type=path, required=True, metavar="FILE.csv", help="list to write; must not exist")
    protocols = "; ".join(f"{name}: {about}" for name, about in PROTOCOLS.items())
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="fair", help=f"{protocols} (default: fair)")
    parser.add_argument("--images", type=count, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    parser.add_argument("--split", help="sage: split (default: test_unseen)")
    parser.add_argument(
        "--per-rate", type=count, metavar="N", help="sage: the most banned and the most allowed prompts (default: all)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="sage: seed of that selection (default: 0)")
    parser.add_argument("--levels", type=source, metavar="FILE", help="sage: levels.json of psa-jax levels")
    ways = "; ".join(f"{name}: {about}" for name, about in REWRITES.items())
    parser.add_argument("--rewrite", choices=list(REWRITES), help=f"sage: a baseline of words alone. {ways}")


def erase(parser: ArgumentParser) -> None:
    """Flags of `psa-jax evaluate erase`."""
    base_model(parser)
    parser.add_argument(
        "--method",
        choices=["esd", "uce"],
        required=True,
        help="esd: Erased Stable Diffusion, trained; uce: Unified Concept Editing, in closed form",
    )
    parser.add_argument(
        "--concepts",
        type=source,
        required=True,
        metavar="FILE",
        help="CSV of concept and guide; esd erases each concept and does not read its guide",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for the model, new or empty")
    esd = parser.add_argument_group("esd")
    esd.add_argument("--steps", type=count, metavar="N", help="training steps (default: 300)")
    esd.add_argument("--learning-rate", type=rate, metavar="X", help="of Adam (default: 1e-5)")
    esd.add_argument("--strength", type=rate, metavar="X", help="how far from the concept (default: 1)")
    esd.add_argument("--batch-size", type=count, metavar="N", help="noisy pictures a step (default: 8)")
    esd.add_argument("--pictures", type=count, metavar="N", help="pictures drawn of each concept (default: 8)")
    esd.add_argument("--sampler-steps", type=count, metavar="N", help="of those pictures (default: 20)")
    esd.add_argument("--guidance", type=weight, metavar="X", help="of those pictures (default: 3)")
    esd.add_argument("--seed", type=seed, help="of pictures, noise and timesteps (default: 0)")


def verdicts(parser: ArgumentParser) -> None:
    """Flags of `psa-jax evaluate verdicts`."""
    parser.add_argument("file", type=source, metavar="FILE", help="CSV, a line a picture, as released with PSA")
    _baseline(parser)
    parser.add_argument("--json", type=path, metavar="FILE", help="file for the result; must not exist")


def limits(parser: ArgumentParser) -> None:
    """Flags of `psa-jax evaluate limits`."""
    parser.add_argument(
        "--adapter", type=path, required=True, metavar="FILE", help="adapter of the embedded model, or its folder"
    )
    parser.add_argument("--table", type=path, required=True, metavar="FILE", help="embedding table of all users")
    parser.add_argument("--data", type=path, required=True, metavar="DIR", help="folder of SAGE-mini")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for limits.json and limits.md")
    parser.add_argument(
        "--per-rate",
        type=count,
        default=120,
        metavar="N",
        help="the most banned and the most allowed prompts; a third in each harder group (default: 120)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of prompts, noise and claims (default: 0)")
