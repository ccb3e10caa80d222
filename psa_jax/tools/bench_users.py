"""`psa-jax bench generate --users=N`: pictures of N different users in one batch, against the base model alone.

The kind `edit` acts on the text states, so that any pipeline that takes `prompt_embeds` serves a batch of different
users as it is. Measured whole, in JAX and in a stock pipeline of diffusers: tokens, text, adapter, sampler, VAE.
"""

import functools
import json
import time
from argparse import Namespace
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import adapter_arrays, to_file, with_arrays
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.progress import print_stage
from psa_jax.tools.turns import Load, spread, take_turns

STEPS, GUIDANCE = 12, 4.0
PROMPT = "crossed blades and a house in the snow"
COMPARED = 3
"""Users whose pictures are also drawn by themselves."""


def run(args: Namespace) -> int:
    """Measures, prints the result as JSON and writes it to `--json`."""
    load = Load()
    model = BaseModel.from_config({"model": args.model or "tiny"}).load()
    encoder = get_encoder("features")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, kind="edit", tokens=0, gate="categories")
    adapter = _random(config)
    users = encoder.encode(sample_population(args.users))
    print_stage(f"{args.users} users in one batch, in JAX and in diffusers; {args.steps} turns each, after compiling")
    result = {"users": args.users, "steps": STEPS, "model": str(model.folder.name)}
    for name, (ways, difference) in {
        "jax": _jax_ways(model, adapter, users),
        "diffusers": _diffusers_ways(model, adapter, users),
    }.items():
        for call in ways.values():
            call()
        timed = {way: functools.partial(_seconds, call) for way, call in ways.items()}
        turns = take_turns(timed, args.steps, rotate=True)
        result |= spread(f"{name}_pictures_per_second", [args.users / turn["users"] for turn in turns], 1)
        # Of throughputs: 1 is as fast as the base model.
        result |= spread(f"{name}_ratio", [turn["base"] / turn["users"] for turn in turns], 3)
        result[f"{name}_largest_difference_to_own_call"] = difference()
    result |= load.summary()
    if args.json is not None:
        write(args.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _random(config: AdapterConfig) -> Adapter:
    """An adapter whose edit is not zero, so that users get pictures of their own."""
    arrays = adapter_arrays(Adapter(config, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(1), len(arrays))
    filled = {
        name: array if array.any() else 0.1 * jax.random.normal(key, array.shape)
        for key, (name, array) in zip(keys, arrays.items(), strict=True)
    }
    return with_arrays(config, filled)


def _jax_ways(
    model: StableDiffusion, adapter: Adapter, users: np.ndarray
) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    count = len(users)
    options = {"steps": STEPS, "guidance": GUIDANCE}
    with_users = Generator(model, adapter, batch_size=count, **options)
    base, alone = Generator(model, batch_size=count, **options), Generator(model, adapter, batch_size=1, **options)
    prompts, seeds = [PROMPT] * count, list(range(count))

    def difference() -> float:
        together = with_users.pixels(prompts, seeds, users)
        rows = np.linspace(0, count - 1, min(count, COMPARED)).astype(int)
        own = [alone.pixels([PROMPT], [seeds[row]], users[row : row + 1])[0] for row in rows]
        return float(np.abs(together[rows] - np.stack(own)).max())

    ways = {"base": lambda: base(prompts, seeds), "users": lambda: with_users(prompts, seeds, users)}
    return ways, difference


def _diffusers_ways(
    model: StableDiffusion, adapter: Adapter, users: np.ndarray
) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    try:
        import torch
        from diffusers import StableDiffusionPipeline

        from psa_jax.torch.adapter import empty_adapter
    except ImportError as error:
        raise PSAError(f"psa-jax bench generate compares with torch ({error}); pip install 'psa_jax[torch]'") from error

    pipe = StableDiffusionPipeline.from_pretrained(model.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    ours = empty_adapter(adapter.config)
    ours.load_state_dict({name: torch.from_numpy(t.copy()) for name, t in to_file(adapter).items()}, assign=True)
    side = model.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(users), model.unet.config.in_channels, side, side, generator=generator)

    def draw(rows: np.ndarray, edited: bool):
        call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise[rows], "output_type": "np"}
        with torch.inference_mode():
            embeds, negative = pipe.encode_prompt([PROMPT] * len(rows), "cpu", 1, True)
            if edited:
                embeds = ours(embeds, torch.from_numpy(users[rows]), torch.ones(len(rows)))
            return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **call).images

    every = np.arange(len(users))

    def difference() -> float:
        together = draw(every, True)
        rows = np.linspace(0, len(users) - 1, min(len(users), COMPARED)).astype(int)
        return float(np.abs(together[rows] - np.concatenate([draw(rows[[i]], True) for i in range(len(rows))])).max())

    return {"base": lambda: draw(every, False), "users": lambda: draw(every, True)}, difference
