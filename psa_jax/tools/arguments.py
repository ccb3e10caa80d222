"""The flags of every command. Imports nothing heavy: `psa-jax COMMAND --help` must answer at once."""

from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from pathlib import Path
from typing import Any

from psa_jax.models.adapter_config import UNCONDITIONAL
from psa_jax.profiles import schema
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.tools.flags import (
    Reader,
    count,
    finite,
    host_count,
    hub_model,
    index,
    license_name,
    path,
    picture_side,
    place,
    rate,
    run_folder,
    seed,
    side,
    side_64,
    source,
    source_place,
    user_count,
    workers,
)

_PACKAGE = Path(__file__).parents[1]
# A wheel has the configurations inside the package (setup.py puts them there), a clone beside it.
_INSTALLED = _PACKAGE / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
TINY = CONFIGS / "tiny.py"
"""The default configuration, of the embedded model."""

BASE_MODEL = ("model", "variant", "vae", "tokenizer", "model_config")
"""Flags that describe a base model, configuration keys and attributes of `interop.base_model.BaseModel`."""

FORMATS = {
    "native": "for JAX and psa_jax.torch (default)",
    "upstream": "the torch original's psa_adapter.bin",
    "ip-adapter": "for stock diffusers",
    "baked": "a whole model for one user",
    "diffusers": "the base model with the adapter beside it",
    "gates": "what a device needs to tell a server what its user bans, and nothing else",
}
"""Export formats (`tools.export` writes them) and what each is for."""

_CONFIG = "NAME[:ARG]"
_PROFILE = '{"age": 9, "gender": "female"}'


def base_model(parser: ArgumentParser, about: str | None = None, *, required: bool = True):
    """Adds the flags that describe the base model and returns their group, to which more can be added.

    Args:
      about: text under the group's title.
      required: whether --model must be given.
    """
    group = parser.add_argument_group("base model", about)
    group.add_argument(
        "--model",
        type=source_place,
        required=required,
        metavar="PATH",
        help="diffusers folder, .safetensors checkpoint, or tiny: the embedded model",
    )
    group.add_argument(
        "--variant", help="variant of a folder's weight files, such as fp16; a part without it is read as usual"
    )
    group.add_argument("--vae", type=source_place, metavar="PATH", help="another VAE: folder or .safetensors")
    group.add_argument("--tokenizer", type=source_place, metavar="DIR", help="tokenizer files, for a checkpoint")
    group.add_argument(
        "--model-config",
        type=source_place,
        metavar="DIR",
        help="diffusers folder with its JSON files, for a checkpoint",
    )
    return group


def base_model_of_config(parser: ArgumentParser) -> None:
    """Adds the base model flags to a command with --config: each sets the configuration key of its name."""
    base_model(parser, "override the configuration keys of the same names", required=False)


def user_flags(group, *, scale: bool = True) -> None:
    """Adds the flags that say for which user an adapter works and, with `scale`, how strongly."""
    group.add_argument("--profile", metavar="JSON", help=f"profile of a user, such as {_PROFILE}")
    group.add_argument("--user", metavar="ID", help="id of a user in --table")
    group.add_argument("--table", type=source, metavar="FILE", help="embedding table")
    if scale:
        group.add_argument("--scale", type=finite, default=1.0, help="strength of the adapter (default: 1)")


def population(parser: ArgumentParser) -> None:
    """Flags of `psa-jax population`."""
    parser.add_argument("--n", type=user_count, default=1000, help="number of users (default: %(default)s)")
    parser.add_argument(
        "--seed", type=seed, default=2025, help="random seed (default: 2025, of the users released with SAGE)"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="new users.csv (mode 0600)")


def encode(parser: ArgumentParser) -> None:
    """Flags of `psa-jax encode`."""
    parser.add_argument(
        "source", type=path, metavar="USERS", help="users.csv or a folder of <id>.npy files; with --forget, a table"
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="TABLE",
        help="embedding table to write (mode 0600); with --add or --update, one that exists",
    )
    parser.add_argument(
        "--encoder",
        default="features",
        choices=list(ENCODERS),
        help="encoder of the profiles (default: features)",
    )
    parser.add_argument("--standardise", action="store_true", help="scale every column to mean 0 and deviation 1")
    parser.add_argument("--add", action="store_true", help="add these users to the table at --out, on its scale")
    parser.add_argument("--update", action="store_true", help="like --add, and replace users that the table has")
    parser.add_argument(
        "--forget", metavar="ID", action="append", help="only remove this user from the table USERS; may be repeated"
    )
    qwen = parser.add_argument_group("qwen")
    qwen.add_argument("--model", type=source, metavar="DIR", help="Qwen2.5 folder in transformers' layout")
    qwen.add_argument(
        "--pooling", default="mean", choices=["mean", "sum"], help="pooling of the tokens (default: mean)"
    )
    qwen.add_argument("--template", type=path, metavar="FILE", help="prompt text with fields such as <<AGE>>")
    qwen.add_argument("--ask-model", action="store_true", help="let the model propose the bans; minors never get fewer")
    qwen.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the weights")
    qwen.add_argument("--batch-size", type=count, default=16, metavar="N", help="profiles per batch (default: 16)")


def levels(parser: ArgumentParser) -> None:
    """Flags of `psa-jax levels`."""
    parser.add_argument("table", type=source, metavar="TABLE", help="embedding table")
    parser.add_argument("--users", type=source, required=True, metavar="FILE", help="users.csv of the table")
    parser.add_argument("--seed", type=seed, default=0, help="random seed of the clustering (default: 0)")
    parser.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder for new levels.json and levels.png"
    )


def mini(parser: ArgumentParser) -> None:
    """Flags of `psa-jax mini`."""
    parser.add_argument("--out", type=path, required=True, help="folder to write; must be absent or empty")
    parser.add_argument("--users", type=user_count, default=200, help="users of the train split (default: 200)")
    parser.add_argument("--seed", type=seed, default=0, help="random seed of the whole data set (default: 0)")
    parser.add_argument(
        "--paraphrase",
        action=BooleanOptionalAction,
        default=True,
        help="word the two prompts of a pair independently (default: yes)",
    )


def check(parser: ArgumentParser) -> None:
    """Flags of `psa-jax check`."""
    parser.add_argument("sage_dir", type=path, metavar="SAGE_DIR", help="dataset folder in SAGE's layout")
    parser.add_argument("--json", type=path, metavar="FILE", help="new file for the report (mode 0600)")
    parser.add_argument(
        "--quarantine", type=path, metavar="FILE", help="new file for bad rows (default: SAGE_DIR/quarantine.jsonl)"
    )
    parser.add_argument("--users", type=path, metavar="FILE", help="users.csv to compare with (default: SAGE's)")
    parser.add_argument("--processes", type=workers, metavar="N", help="decoding processes (default: one per core)")
    parser.add_argument(
        "--no-images", dest="images", action="store_false", help="check only that pictures exist, do not decode"
    )


def build(parser: ArgumentParser) -> None:
    """Flags of `psa-jax build`."""
    parser.add_argument("sage_dir", type=path, metavar="SAGE_DIR", help="folder in SAGE's layout, or with own pairs")
    base_model(parser)
    parser.add_argument("--out", type=path, required=True, metavar="SHARDS", help="new folder (mode 0700)")
    parser.add_argument("--resolution", type=side, metavar="PX", help="side of the pictures (default: the model's)")
    parser.add_argument("--flips", action="store_true", help="also store every picture mirrored")
    parser.add_argument("--text-embeddings", action="store_true", help="also store the text encoders' outputs")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="pictures per batch (default: 16)")
    parser.add_argument("--threads", type=workers, metavar="N", help="decoding threads (default: one per core)")
    several_hosts(parser, "each encodes a part; a last call without these makes the shards")


def several_hosts(parser: ArgumentParser, how: str) -> None:
    """Flags of commands whose work hosts share."""
    hosts = parser.add_argument_group("several hosts", how)
    hosts.add_argument("--host", type=index, metavar="I", help="number of this host, from 0")
    hosts.add_argument(
        "--hosts",
        type=host_count,
        metavar="N",
        help="number of hosts; auto: SLURM, Open MPI, SkyPilot or a TPU slice on GKE say both",
    )


def memory(parser: ArgumentParser) -> None:
    """Flags of `psa-jax memory`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--config", type=place, required=True, metavar=_CONFIG, help="training configuration")
    base_model_of_config(parser)
    parser.add_argument(
        "--topology", metavar="SLICE", help="TPU slice, such as v5e:2x4 or v5p:2x2x1 (default: this machine)"
    )
    parser.add_argument("--resolution", type=side, metavar="PX", help="resolution of the shards (default: the model's)")
    cached_text(parser)


def aot(parser: ArgumentParser) -> None:
    """Flags of `psa-jax aot`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--config", type=place, required=True, metavar=_CONFIG, help="training configuration")
    base_model_of_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="TPU slice, such as v5e:4x4 or v5p:2x2x1; --config.mesh.slices=2 are two like it",
    )
    parser.add_argument(
        "--what",
        default="train",
        choices=["train", "generate", "build", "reference"],
        help="train: a training step (default); generate: a batch of pictures with guidance, on one chip; build: VAE "
        "and text encoders, on the chips of one host; reference: the pass before the first step, with stored draws",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help="pairs, or pictures of generate, in a batch (default: as configured; generate: 8, build: 16)",
    )
    parser.add_argument("--largest", action="store_true", help="instead: find the largest batch per chip that fits")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the compiler with the least effort: memory, FLOP and collectives in minutes, and no time",
    )
    parser.add_argument("--resolution", type=side, metavar="PX", help="side of the pictures (default: the model's)")
    parser.add_argument("--steps", type=count, default=20, help="generate: sampler steps (default: 20)")
    cached_text(parser)
    parser.add_argument("--json", type=path, metavar="FILE", help="file for the result; must not exist")


def cached_text(parser: ArgumentParser | _ArgumentGroup) -> None:
    """A flag of the commands that compile a step without data."""
    parser.add_argument(
        "--cached-text", action="store_true", help="as with shards built with --text-embeddings: no text encoder"
    )


def bench(parser: ArgumentParser) -> None:
    """Flags of `psa-jax bench`."""
    parser.add_argument(
        "what",
        choices=["input", "step", "generate"],
        help="input: pairs per second of the input pipeline; step: seconds and peak memory of a training step; "
        "generate: time of a sampling step with an adapter relative to one without, in JAX and torch",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="file for the result; must not exist")
    parser.add_argument("--steps", type=count, default=15, help="step, generate: steps to measure (default: 15)")
    parser.add_argument(
        "--resolution", type=side, metavar="PX", help="input, step: resolution (default: 512; step: the model's)"
    )
    parser.set_defaults(takes_config=True)
    training = parser.add_argument_group("step")
    training.add_argument(
        "--config", type=place, default=f"{TINY}:dpo", metavar=_CONFIG, help="default: tiny:dpo, of the embedded model"
    )
    training.add_argument("--against", choices=["torch"], help="also measure this implementation and print the ratios")
    training.add_argument("--pairs", type=count, metavar="N", help="pairs per step (default: as configured)")
    cached_text(training)
    base_model(parser, "step: override the configuration keys of the same names", required=False)
    sampling = parser.add_argument_group("generate")
    sampling.add_argument(
        "--users", type=count, metavar="N", help="instead: N different users in one batch, against the base model alone"
    )
    sampling.add_argument("--size", type=side_64, default=128, metavar="PX", help="side of the picture (default: 128)")
    parser = parser.add_argument_group("input")
    parser.add_argument(
        "--picture-size", type=picture_side, default=512, metavar="PX", help="side of the JPEGs (default: 512)"
    )
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="pairs per batch (default: 32)")
    parser.add_argument("--threads", type=workers, default=4, metavar="N", help="reading threads (default: 4)")
    parser.add_argument("--seconds", type=rate, default=8.0, help="seconds to measure each implementation (default: 8)")


def experiment(parser: ArgumentParser, workdir: Reader = path) -> None:
    """Flags of commands with a configuration and a working folder. The command gets `config` as a ConfigDict.

    Args:
      workdir: the type of --workdir.
    """
    # takes_config: the command line also collects --config.KEY=VALUE and reads the file (psa_jax.tools.configs).
    parser.set_defaults(takes_config=True)
    parser.add_argument(
        "--config",
        type=place,
        required=True,
        metavar=_CONFIG,
        help="configuration: tiny, sd15, sd21, sdxl, or a Python file with get_config([ARG])",
    )
    parser.add_argument("--workdir", type=workdir, required=True, metavar="DIR", help="folder for all output")
    parser.epilog = "--config.KEY=VALUE sets any value of the configuration, such as --config.seed=1."


class _Instead(Action):
    """A flag that stands for what the command does, which then needs no --workdir."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest == "workdir":
                action.required = False


def train(parser: ArgumentParser) -> None:
    """Flags of `psa-jax train`."""
    experiment(parser, run_folder)
    base_model_of_config(parser)
    parser.add_argument(
        "--print-config", action=_Instead, nargs=0, default=False, help="print the whole configuration as JSON, and end"
    )
    parser.add_argument(
        "--init-from", type=source, metavar="FILE", help="adapter of the same kind and sizes to start from"
    )
    group = parser.add_argument_group(
        "several processes",
        "run the same command in each; TPU pods, SLURM and Open MPI need no flags",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; auto: JAX finds all three")
    group.add_argument("--num-processes", type=workers, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=index, metavar="I", help="number of this process, from 0")


def doctor(parser: ArgumentParser) -> None:
    """Flags of `psa-jax doctor`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument(
        "--config", type=place, metavar=_CONFIG, help="training configuration to check as well (default: none)"
    )
    base_model_of_config(parser)
    parser.add_argument("--workdir", type=run_folder, metavar="DIR", help="its folder for all output")


def demo(parser: ArgumentParser) -> None:
    """Flags of `psa-jax demo`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--workdir", type=path, required=True, metavar="DIR", help="folder for all output")
    parser.add_argument(
        "--config", type=place, default=str(TINY), metavar=_CONFIG, help="default: tiny, of the embedded model"
    )
    base_model_of_config(parser)
    parser.add_argument("--compare", action="store_true", help="also train the comparison adapters")
    parser.add_argument("--record", type=path, metavar="FILE", help="with --compare: file for the verdicts")
    parser.add_argument(
        "--all-ways",
        action="store_true",
        help=f"evaluate all unconditional sides ({', '.join(UNCONDITIONAL)}), for the cards of all export formats",
    )


def curves(parser: ArgumentParser) -> None:
    """Flags of `psa-jax curves`."""
    parser.add_argument("workdir", type=path, metavar="WORKDIR", help="folder of a run of psa-jax train")


def compare(parser: ArgumentParser) -> None:
    """Flags of `psa-jax compare`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--workdir", type=path, required=True, metavar="DIR", help="folder for all output")
    parser.add_argument(
        "--config", type=place, default=str(TINY), metavar=_CONFIG, help="default: tiny, of the embedded model"
    )
    parser.add_argument(
        "--methods",
        required=True,
        metavar="A-O,…",
        help="what is compared, each an adapter and an objective, such as text-dpo,edit-swap,edit-dpo_swap",
    )
    parser.add_argument(
        "--seeds", type=count, default=1, metavar="N", help="trainings of each, seeds 0 to N-1 (default: 1)"
    )
    parser.add_argument(
        "--known", type=path, metavar="FILE", help="record.jsonl of another comparison, whose runs are not run again"
    )
    parser.epilog = (
        "Runs that have ended are not run again, so that methods and seeds can be added; the table has all of them. "
        "--config.KEY=VALUE sets values such as --config.steps=1400; a method sets seed, adapter, objective and, but "
        "for edit_categories-swap, the mixture of the data."
    )


def export(parser: ArgumentParser) -> None:
    """Flags of `psa-jax export`."""
    parser.add_argument("adapter", type=source, metavar="ADAPTER", help="run folder or native adapter file")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="native",
        help="; ".join(f"{name}: {purpose}" for name, purpose in FORMATS.items()),
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="PATH", help="folder or .safetensors to write; must not exist"
    )
    parser.add_argument("--report", type=source, metavar="FILE", help="report.json with the rates for the model card")
    parser.add_argument(
        "--license",
        type=license_name,
        metavar="ID",
        help="licence of the adapter's weights for the model card, such as openrail++, or other (default: unknown)",
    )
    parser.add_argument(
        "--base-model",
        type=hub_model,
        metavar="ORG/NAME",
        help="id of the base model on the Hugging Face Hub for the model card (default: none is named)",
    )
    base_model(parser, "base model of the adapter, for baked and diffusers", required=False)
    baked = parser.add_argument_group("baked", f"keys of --profile and their values: {schema.describe()}")
    user_flags(baked)


def import_(parser: ArgumentParser) -> None:
    """Flags of `psa-jax import`."""
    parser.add_argument(
        "file", type=source, metavar="FILE", help="native file, or the torch original's psa_adapter.bin or safetensors"
    )
    base_model(parser, "base model of the adapter; only its configuration is read")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="native file to write; must not exist")
