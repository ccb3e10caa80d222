"""`psa-jax playground`: a page on this machine that draws one prompt for several users side by side.

The profiles that are typed into the page stay in this process: nothing of them is written or logged.
"""

import contextlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import Iterator

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import find_adapter, read_metadata
from psa_jax.interop.diffusers import EMBEDDED
from psa_jax.pipeline import Pipeline, load
from psa_jax.playground.asked import RULES, Asked
from psa_jax.playground.page import EXAMPLES, FIRST, PRESETS, render_page
from psa_jax.playground.studio import Studio
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.progress import print_on_main, print_stage


def run(args: Namespace) -> int:
    """Serves the page until Ctrl-C; when it can be opened, the last line on stdout is JSON with its address.

    Raises:
      PSAError: a wrong flag, a port that is taken, or an adapter that cannot draw for a profile.
      KeyboardInterrupt: Ctrl-C.
    """
    try:
        from psa_jax.playground import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "psa_jax":
            raise
        raise PSAError("psa-jax playground serves with starlette: pip install 'psa_jax[playground]'") from error
    for name in ("steps", "guidance"):
        if not RULES[name].holds(getattr(args, name)):
            raise PSAError(f"--{name}: give {RULES[name].wanted}")
    people = tuple(UserProfile.from_mapping(PRESETS[name]) for name in FIRST)
    adapter = find_adapter(args.adapter)
    # Before the weights are read, which takes long.
    user_embedding(adapter, read_metadata(adapter), profile=people[0], user=None, table=args.table)
    with _prompts_unquoted(), server.bound(args.port) as listening:
        pipe = _pipeline(args)
        studio = Studio(pipe, _settings(args), batch=len(people) + args.allow_unprotected)
        _compile(studio, Asked("", people, 0, args.steps, args.guidance, 1.0, args.allow_unprotected))
        about = {
            "facts": {"Base model": args.model, "Adapter": str(args.adapter), "Kind": pipe.adapter.config.kind},
            "steps": args.steps,
            "guidance": args.guidance,
            "size": min(args.size or pipe.model.picture_size),
            "examples": EXAMPLES if args.model == EMBEDDED else (),
            "allow_unprotected": args.allow_unprotected,
            "own_bans": pipe.adapter.config.by_categories,
        }
        port = listening.getsockname()[1]
        app = server.make_app(studio.draw, lambda nonce: render_page(nonce, **about), args.allow_unprotected, port)
        listening.listen()
        url = f"http://{server.LOOPBACK}:{port}/"
        print_on_main(f"open {url} in a browser of this machine; Ctrl-C ends")
        print(json.dumps({"url": url}), flush=True)
        server.make_server(app).run(sockets=[listening])
    return 0


@contextlib.contextmanager
def _prompts_unquoted() -> Iterator[None]:
    """Keeps warnings about prompts that are too long out of the log: they quote them. The page says it itself."""
    log = logging.getLogger("psa_jax.diffusion.generate")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _pipeline(args: Namespace) -> Pipeline:
    print_stage(f"reading the base model {args.model}")
    parts = ("dtype", "variant", "vae", "tokenizer", "model_config", "lora", "lora_scale", "table")
    return load(args.model, adapter=args.adapter, **{name: getattr(args, name) for name in parts})


def _settings(args: Namespace) -> dict:
    return {
        "sampler": args.sampler,
        "rescale": args.guidance_rescale,
        "eta": args.eta,
        "karras": True if args.karras else None,
        "unconditional": args.unconditional,
        "size": args.size,
    }


def _compile(studio: Studio, asked: Asked) -> None:
    """Draws a set that nobody sees: the first takes long."""
    count = len(asked.users) + asked.base
    print_stage(f"compiling a sampler for {count} pictures of {asked.steps} steps")
    began = time.monotonic()
    studio.draw(asked)
    print_on_main(f"compiled, with the first {count} pictures, in {time.monotonic() - began:.1f} s")
