"""The flags of every command, in one file that imports nothing heavy: `psa-jax COMMAND --help` must answer at once."""

from argparse import ArgumentParser, _ArgumentGroup
from pathlib import Path

from psa_jax.profiles import schema
from psa_jax.tools.flags import (
    count,
    finite,
    index,
    path,
    picture_seed,
    picture_side,
    place,
    rate,
    seed,
    share,
    side,
    side_64,
    size,
    user_count,
    weight,
    workers,
)

_PACKAGE = Path(__file__).parents[1]
# In a wheel they are in the package (setup.py puts them there), in a clone beside it.
_INSTALLED = _PACKAGE / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
TINY = CONFIGS / "tiny.py"
_CONFIG = "NAME[:ARG]"


BASE_MODEL = ("model", "variant", "vae", "tokenizer", "model_config")
"""What a base model is said by: names of flags, of keys of a configuration, of `interop.base_model.BaseModel`."""


def base_model(parser: ArgumentParser, about: str | None = None, *, required: bool = True):
    """The flags that say what the base model is, as a group, which is given back for more."""
    group = parser.add_argument_group("base model", about)
    group.add_argument(
        "--model",
        type=place,
        required=required,
        metavar="PATH",
        help="diffusers folder, .safetensors checkpoint, or tiny: the embedded",
    )
    group.add_argument(
        "--variant", help="weight files of a folder to read, such as fp16; parts that have none are read without"
    )
    group.add_argument("--vae", type=place, metavar="PATH", help="another VAE: folder or .safetensors")
    group.add_argument("--tokenizer", type=place, metavar="DIR", help="tokenizer files, for a .safetensors checkpoint")
    group.add_argument(
        "--model-config", type=place, metavar="DIR", help="diffusers folder with its JSON files, for such a checkpoint"
    )
    return group


def base_model_of_config(parser: ArgumentParser) -> None:
    """The same where a configuration says it: a flag that is given sets the key of its name."""
    base_model(parser, "in place of the configuration's keys of these names", required=False)


def population(parser: ArgumentParser) -> None:
    """Flags of `psa-jax population`."""
    parser.add_argument("--n", type=user_count, default=1000, help="number of users (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=2025, help="2025 gives the users released with SAGE (the default)")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="a new users.csv (mode 0600)")


def encode(parser: ArgumentParser) -> None:
    """Flags of `psa-jax encode`."""
    parser.add_argument(
        "source", type=path, metavar="USERS", help="users.csv, or a folder of <id>.npy; with --forget a table"
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="TABLE",
        help="new embedding table (mode 0600); with --add an old one",
    )
    parser.add_argument(
        "--encoder", default="features", choices=["features", "features-no-bans", "qwen"], help="default: features"
    )
    parser.add_argument("--standardise", action="store_true", help="every column to mean 0 and deviation 1, recorded")
    parser.add_argument("--add", action="store_true", help="add users to the table that --out names, on its scale")
    parser.add_argument("--update", action="store_true", help="as --add, and replace what it has of these users")
    parser.add_argument(
        "--forget",
        metavar="ID",
        action="append",
        help="remove this user from the table USERS, and do nothing else; may be given several times",
    )
    qwen = parser.add_argument_group("qwen")
    qwen.add_argument("--model", type=path, metavar="DIR", help="Qwen2.5 folder in transformers' layout")
    qwen.add_argument("--pooling", default="mean", choices=["mean", "sum"], help="over the tokens (default: mean)")
    qwen.add_argument("--template", type=path, metavar="FILE", help="text with fields such as <<AGE>>, for the prompt")
    qwen.add_argument("--ask-model", action="store_true", help="let the model propose the bans (minors: never fewer)")
    qwen.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    qwen.add_argument("--batch-size", type=count, default=16, metavar="N", help="profiles a call (default: 16)")


def levels(parser: ArgumentParser) -> None:
    """Flags of `psa-jax levels`."""
    parser.add_argument("table", type=path, metavar="TABLE", help="embedding table")
    parser.add_argument("--users", type=path, required=True, metavar="FILE", help="the users.csv it was made from")
    parser.add_argument("--seed", type=seed, default=0, help="of the clustering (default: 0)")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for new levels.json and .png")


def mini(parser: ArgumentParser) -> None:
    """Flags of `psa-jax mini`."""
    parser.add_argument("--out", type=path, required=True, help="folder to write; absent or empty")
    parser.add_argument(
        "--users", type=user_count, default=200, help="train users (default: 200); other splits in proportion"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of concepts, scenes and captions (default: 0)")


def check(parser: ArgumentParser) -> None:
    """Flags of `psa-jax check`."""
    parser.add_argument("sage_dir", type=path, metavar="SAGE_DIR", help="folder in SAGE's layout")
    parser.add_argument("--json", type=path, metavar="FILE", help="new file for the report (mode 0600)")
    parser.add_argument(
        "--quarantine", type=path, metavar="FILE", help="new file for bad rows (default: SAGE_DIR/quarantine.jsonl)"
    )
    parser.add_argument("--users", type=path, metavar="FILE", help="users.csv to compare with (default: the released)")
    parser.add_argument("--processes", type=workers, metavar="N", help="processes that decode (default: one a core)")
    parser.add_argument(
        "--no-images", dest="images", action="store_false", help="do not open the pictures; they must still be there"
    )


def build(parser: ArgumentParser) -> None:
    """Flags of `psa-jax build`."""
    parser.add_argument("sage_dir", type=path, metavar="SAGE_DIR", help="folder in SAGE's layout")
    base_model(parser)
    parser.add_argument("--out", type=path, required=True, metavar="SHARDS", help="folder to make (mode 0700)")
    parser.add_argument("--resolution", type=side, metavar="PX", help="side of the pictures (default: the model's)")
    parser.add_argument("--flips", action="store_true", help="store every picture mirrored, too")
    parser.add_argument("--text-embeddings", action="store_true", help="store the text encoders' states, too")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="pictures a call (default: 16)")
    parser.add_argument("--threads", type=workers, metavar="N", help="threads that decode (default: one a core)")
    hosts = parser.add_argument_group("several hosts", "each encodes a part; a last call without these makes shards")
    hosts.add_argument("--host", type=index, metavar="I", help="which host this is, from 0")
    hosts.add_argument("--hosts", type=workers, metavar="N", help="how many there are")


def memory(parser: ArgumentParser) -> None:
    """Flags of `psa-jax memory`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--config", type=place, required=True, metavar=_CONFIG, help="as it would be trained")
    base_model_of_config(parser)
    parser.add_argument(
        "--topology", metavar="SLICE", help="a TPU slice such as v5e:2x4 or v5p:2x2x1 (default: the devices at hand)"
    )
    parser.add_argument("--resolution", type=side, metavar="PX", help="of the shards (default: the model's own)")
    cached_text(parser)


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
        help="input: pairs a second of the input pipeline alone; step: a training step's seconds and peak memory; "
        "generate: a sampling step with an adapter over one without, in JAX and torch",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="new file for the result")
    parser.add_argument("--steps", type=count, default=15, help="step, generate: measured, each way (default: 15)")
    parser.add_argument(
        "--resolution", type=side, metavar="PX", help="input, step: of training (default: 512; step: the model's own)"
    )
    parser.set_defaults(takes_config=True)
    training = parser.add_argument_group("step")
    training.add_argument(
        "--config", type=place, default=str(TINY), metavar=_CONFIG, help="default: tiny, the embedded model's"
    )
    training.add_argument("--against", choices=["torch"], help="measure that way, too, and print the ratios")
    training.add_argument("--pairs", type=count, metavar="N", help="in a step (default: batch_size of the config)")
    cached_text(training)
    base_model(parser, "step: in place of the configuration's keys of these names", required=False)
    drawing = parser.add_argument_group("generate")
    drawing.add_argument("--size", type=side_64, default=128, metavar="PX", help="side of the picture (default: 128)")
    parser = parser.add_argument_group("input")
    parser.add_argument(
        "--picture-size", type=picture_side, default=512, metavar="PX", help="of the JPEGs (default: 512)"
    )
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="pairs a batch (default: 32)")
    parser.add_argument("--threads", type=workers, default=4, metavar="N", help="threads of either way (default: 4)")
    parser.add_argument("--seconds", type=rate, default=8.0, help="of measuring, each way (default: 8)")


def experiment(parser: ArgumentParser) -> None:
    """Flags of the commands that take a config file. The command gets `config` as a ConfigDict."""
    # With takes_config the command line collects --config.KEY=VALUE too and reads the file (psa_jax.tools.configs).
    parser.set_defaults(takes_config=True)
    parser.add_argument(
        "--config",
        type=place,
        required=True,
        metavar=_CONFIG,
        help="tiny, sd15, sd21 or sdxl; or a Python file with get_config([ARG])",
    )
    parser.add_argument("--workdir", type=path, required=True, metavar="DIR", help="where everything is written")
    parser.epilog = "--config.KEY=VALUE sets any value of the config, such as --config.seed=1."


def train(parser: ArgumentParser) -> None:
    """Flags of `psa-jax train`."""
    experiment(parser)
    base_model_of_config(parser)
    group = parser.add_argument_group(
        "several processes",
        "all given the same command; on TPU pods, SLURM and Open MPI they find each other, elsewhere say who is who",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; auto: let JAX find all three")
    group.add_argument("--num-processes", type=workers, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=index, metavar="I", help="which one this is, from 0")


def demo(parser: ArgumentParser) -> None:
    """Flags of `psa-jax demo`."""
    parser.set_defaults(takes_config=True)
    parser.add_argument("--workdir", type=path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument(
        "--config", type=place, default=str(TINY), metavar=_CONFIG, help="default: tiny, the embedded model's"
    )
    base_model_of_config(parser)
    parser.add_argument("--compare", action="store_true", help="train the comparison adapters too")
    parser.add_argument("--record", type=path, metavar="FILE", help="with --compare: write what later runs quote")
    parser.add_argument(
        "--all-ways",
        action="store_true",
        help="judge the adapter with every unconditional side (off, zeros, same), for cards of every export format",
    )


def generate(parser: ArgumentParser) -> None:
    """Flags of `psa-jax generate`."""
    model = base_model(parser)
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    model.add_argument(
        "--lora",
        type=path,
        metavar="PATH",
        help="LoRA of UNet and text encoders: kohya's or diffusers' file, or peft's folder",
    )
    model.add_argument("--lora-scale", type=finite, default=1.0, help="its strength (default: 1)")
    user = parser.add_argument_group("user", f"keys of --profile and their values: {schema.describe()}")
    user.add_argument(
        "--adapter", type=path, metavar="FILE", help="native adapter or its folder; without it the base model draws"
    )
    user.add_argument("--profile", metavar="JSON", help='such as {"age": 9, "gender": "female"}')
    user.add_argument("--user", metavar="ID", help="a user id in --table")
    user.add_argument("--table", type=path, metavar="FILE", help="embedding table")
    user.add_argument("--scale", type=finite, default=1.0, help="strength of the adapter (default: 1)")
    user.add_argument(
        "--unconditional",
        default="off",
        choices=["off", "zeros", "same"],
        help="adapter on the unconditional side (default: off)",
    )
    prompt = parser.add_argument_group("prompts")
    prompt.add_argument("--prompt", action="append", help="may be given several times")
    prompt.add_argument(
        "--prompts", type=path, metavar="FILE", help="a prompt a line, or .csv/.tsv with columns prompt, negative, seed"
    )
    prompt.add_argument("--negative", metavar="PROMPT", help="negative prompt")
    prompt.add_argument(
        "--seed", type=picture_seed, default=0, help="of the first picture of each prompt, 0 to 2^64 - 1 (default: 0)"
    )
    prompt.add_argument("--images", type=count, default=1, metavar="N", help="pictures a prompt (default: 1)")
    how = parser.add_argument_group("sampling")
    how.add_argument(
        "--sampler",
        choices=["ddim", "euler", "euler-ancestral", "dpmsolver++", "unipc", "pndm"],
        help="default: the folder's scheduler",
    )
    how.add_argument("--steps", type=count, default=20, help="sampler steps (default: 20)")
    how.add_argument("--guidance", type=weight, default=7.5, help="classifier-free guidance (default: 7.5)")
    how.add_argument("--guidance-rescale", type=share, default=0.0, metavar="PHI", help="0 to 1 (default: 0)")
    how.add_argument("--eta", type=share, default=0.0, help="DDIM's share of fresh noise (default: 0)")
    how.add_argument("--karras", action="store_true", help="Karras' noise levels (euler, dpmsolver++, unipc)")
    how.add_argument("--size", type=size, metavar="HxW", help="such as 768 or 512x768 (default: the model's)")
    how.add_argument("--batch-size", type=count, default=8, metavar="N", help="pictures a call (default: 8)")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for the PNG files")


def export(parser: ArgumentParser) -> None:
    """Flags of `psa-jax export`."""
    parser.add_argument("adapter", type=path, metavar="ADAPTER", help="a run's folder or a native adapter file")
    parser.add_argument(
        "--format",
        choices=["native", "upstream", "ip-adapter", "baked", "diffusers"],
        default="native",
        help="native (default): for JAX and psa_jax.torch; upstream: the torch original's psa_adapter.bin; ip-adapter: "
        "stock diffusers; baked: a whole model for one user; diffusers: the base model with the adapter beside it",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="PATH", help="folder or .safetensors to write; must not exist"
    )
    parser.add_argument("--report", type=path, metavar="FILE", help="report.json whose rates go into the model card")
    base_model(parser, "the adapter's, for baked and diffusers", required=False)
    baked = parser.add_argument_group("baked", f"keys of --profile and their values: {schema.describe()}")
    baked.add_argument("--profile", metavar="JSON", help='such as {"age": 9, "gender": "female"}')
    baked.add_argument("--user", metavar="ID", help="a user id in --table")
    baked.add_argument("--table", type=path, metavar="FILE", help="embedding table")
    baked.add_argument("--scale", type=finite, default=1.0, help="strength of the adapter (default: 1)")


def import_(parser: ArgumentParser) -> None:
    """Flags of `psa-jax import`."""
    parser.add_argument(
        "file", type=path, metavar="FILE", help="native file, or the torch original's psa_adapter.bin or safetensors"
    )
    base_model(parser, "the one that it belongs to; only configurations are read")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="native file to write; must not exist")
