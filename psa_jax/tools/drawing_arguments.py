"""The flags of the commands that draw: `generate`, `explain` and `playground`. Imports nothing heavy."""

from argparse import ArgumentParser, _ArgumentGroup

from psa_jax.diffusion.sampler_registry import SAMPLERS, with_karras
from psa_jax.diffusion.sld_strengths import STRENGTHS
from psa_jax.models.adapter_config import UNCONDITIONAL
from psa_jax.profiles import schema
from psa_jax.rules import DTYPES
from psa_jax.tools.arguments import base_model, user_flags
from psa_jax.tools.flags import count, finite, path, picture_seed, port, share, size, source, weight


def _weights(group: _ArgumentGroup) -> None:
    """Adds the flags of commands that draw to those of the base model."""
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="dtype of the weights")
    group.add_argument(
        "--lora",
        type=source,
        metavar="PATH",
        help="LoRA of UNet and text encoders: a file of kohya or diffusers, or a folder of peft",
    )
    group.add_argument("--lora-scale", type=finite, default=1.0, help="strength of the LoRA (default: 1)")


def _unconditional(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--unconditional",
        default="off",
        choices=list(UNCONDITIONAL),
        help="user embedding on the unconditional side of guidance (default: off)",
    )


def _sampling(parser: ArgumentParser) -> _ArgumentGroup:
    """Adds the flags of the sampler and returns their group, to which more can be added."""
    how = parser.add_argument_group("sampling")
    how.add_argument("--sampler", choices=list(SAMPLERS), help="sampler (default: the model folder's scheduler)")
    how.add_argument("--steps", type=count, default=20, help="sampler steps (default: 20)")
    how.add_argument("--guidance", type=weight, default=7.5, help="scale of classifier-free guidance (default: 7.5)")
    how.add_argument("--guidance-rescale", type=share, default=0.0, metavar="PHI", help="rescale, 0 to 1 (default: 0)")
    how.add_argument("--eta", type=share, default=0.0, help="share of fresh noise in DDIM (default: 0)")
    how.add_argument("--karras", action="store_true", help=f"use Karras noise levels ({', '.join(with_karras())})")
    how.add_argument("--size", type=size, metavar="HxW", help="size, such as 768 or 512x768 (default: the model's)")
    return how


def generate(parser: ArgumentParser) -> None:
    """Flags of `psa-jax generate`."""
    _weights(base_model(parser))
    user = parser.add_argument_group("user", f"keys of --profile and their values: {schema.describe()}")
    user.add_argument(
        "--adapter",
        type=source,
        metavar="FILE",
        help="native adapter file or its folder (default: the base model alone)",
    )
    user_flags(user)
    _unconditional(user)
    prompt = parser.add_argument_group("prompts")
    prompt.add_argument("--prompt", action="append", help="prompt; may be repeated")
    prompt.add_argument(
        "--prompts",
        type=source,
        metavar="FILE",
        help="one prompt per line, or .csv/.tsv with columns prompt, negative, seed, and, for psa-jax evaluate, "
        "prompt_id, user_id (of --table), category, unsafe, banned, group, level",
    )
    prompt.add_argument("--negative", metavar="PROMPT", help="negative prompt")
    prompt.add_argument(
        "--seed", type=picture_seed, default=0, help="seed of each prompt's first picture, 0 to 2^64 - 1 (default: 0)"
    )
    prompt.add_argument("--images", type=count, default=1, metavar="N", help="pictures per prompt (default: 1)")
    how = _sampling(parser)
    how.add_argument("--batch-size", type=count, default=8, metavar="N", help="pictures per batch (default: 8)")
    how.add_argument(
        "--sld", choices=list(STRENGTHS), help="Safe Latent Diffusion of this strength, for the base model alone"
    )
    how.add_argument("--sld-concept", metavar="TEXT", help="what it leads away from (default: its authors' words)")
    how.add_argument(
        "--uce", type=source, metavar="FILE", help="Unified Concept Editing of the base model: CSV of concept and guide"
    )
    parser.add_argument("--method", metavar="NAME", help="name in the manifest (default: base, psa, uce or sld-…)")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for the PNG files")


def explain(parser: ArgumentParser) -> None:
    """Flags of `psa-jax explain`."""
    base_model(parser, "base model of the adapter; only its text encoders are read")
    parser.add_argument(
        "--adapter", type=source, required=True, metavar="FILE", help="adapter with a gate by categories"
    )
    user = parser.add_argument_group("user", f"keys of --profile and their values: {schema.describe()}")
    user_flags(user, scale=False)
    parser.add_argument("--prompt", action="append", required=True, help="prompt; may be repeated")


def playground(parser: ArgumentParser) -> None:
    """Flags of `psa-jax playground`."""
    _weights(base_model(parser))
    user = parser.add_argument_group("users", "their profiles are typed into the page")
    user.add_argument("--adapter", type=source, required=True, metavar="FILE", help="native adapter file or its folder")
    user.add_argument(
        "--table", type=source, metavar="FILE", help="embedding table, for an adapter of a standardised one"
    )
    _unconditional(user)
    user.add_argument(
        "--allow-unprotected",
        action="store_true",
        help="also draw what the base model shows everybody, beside the users",
    )
    _sampling(parser)
    page = parser.add_argument_group("page", "it is served to this machine alone, at 127.0.0.1")
    page.add_argument("--port", type=port, default=8017, help="port; 0: any free one (default: 8017)")
