"""`psa-jax bench generate`: time of a sampling step with an adapter relative to one without, in JAX and in torch.

Weights are random, and a step computes both sides of guidance. All implementations take turns, and a ratio is the
median of the ratios within a turn, so that a temporary load slows all of them alike.
"""

import functools
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.interop.diffusers import abstract_model, config_json
from psa_jax.interop.native import to_file
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import UNet
from psa_jax.progress import print_stage, track
from psa_jax.tools.turns import Load, spread, take_turns

USER_DIM = 3584
DEFAULT_KIND = "text"
TOKENS = 4
TEXT = 77
BATCH = 2  # one picture, both sides of guidance


def run(args: Namespace) -> int:
    """Measures an SD1.5-sized UNet; prints the result as JSON and writes it to `--json`."""
    load = Load()
    print_stage(
        f"an SD1.5-sized UNet of random weights, in JAX and then in torch; {args.steps} turns each, after compiling"
    )
    result = ratios(UNetConfig(), args.size // 8, args.steps)
    result |= {"size": args.size, "steps": args.steps, **load.summary()}
    if args.json is not None:
        write(args.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def ratios(config: UNetConfig, side: int, steps: int) -> dict[str, Any]:
    """Measures the time of a step with each kind of adapter relative to that of the base model.

    Args:
      config: of the UNet.
      side: of the latents.
      steps: measured steps of each implementation.

    Returns:
      Medians over the turns. `jax_ratio`, `torch_ratio`: the default kind. `original_ratio`: separate keys, values and
      attention in every layer and step, as in the torch original. `jax`, `torch`: every kind, and the seconds of the
      base model. `quartiles`: of every ratio in `jax` and `torch`.
    """
    adapters = {kind: _adapter(config, kind) for kind in ADAPTER_KINDS}
    print_stage("JAX: weights, compiling and a first step of each kind")
    in_jax, jax_quartiles = _measured(_jax_ways(config, side, adapters), steps)
    print_stage("torch: weights and a first step of each kind")
    in_torch, torch_quartiles = _measured(_torch_ways(config, side, adapters), steps)
    return {
        "jax_ratio": in_jax[DEFAULT_KIND],
        "torch_ratio": in_torch[DEFAULT_KIND],
        "original_ratio": in_torch["original"],
        "jax": in_jax,
        "torch": in_torch,
        "quartiles": {"jax": jax_quartiles, "torch": torch_quartiles},
    }


def _measured(ways: dict[str, Callable[[], None]], steps: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Ratios of the times to that of "base" within a turn: medians, with "base" in seconds, and quartiles."""

    def seconds(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for step in track(ways.values(), len(ways), "kind", "first steps"):
        step()
    turns = take_turns({name: functools.partial(seconds, step) for name, step in ways.items()}, steps, rotate=True)
    medians, quartiles = {"base_seconds": round(statistics.median(turn["base"] for turn in turns), 4)}, {}
    for name in [name for name in ways if name != "base"]:
        found = spread(name, [turn[name] / turn["base"] for turn in turns])
        medians[name], quartiles[name] = found.values()
    return medians, quartiles


def _noise(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Fills weights and inputs with one repeated block of noise, which is quick at any size."""
    block = np.random.default_rng(0).standard_normal(min(int(np.prod(shape)), 1 << 20), np.float32)
    return scale * np.resize(block, shape)


def _adapter(config: UNetConfig, kind: str) -> Adapter:
    made = nnx.eval_shape(
        lambda: Adapter(AdapterConfig.for_unet(config, user_dim=USER_DIM, kind=kind, tokens=TOKENS), rngs=nnx.Rngs(0))
    )
    return jax.tree.map(lambda leaf: jnp.asarray(_noise(leaf.shape, 0.02)), made)


def _jax_ways(config: UNetConfig, side: int, adapters: dict[str, Adapter]) -> dict[str, Callable[[], None]]:
    unet = jax.tree.map(lambda leaf: jnp.asarray(_noise(leaf.shape, 0.02)), abstract_model(UNet, config))
    latents = jnp.asarray(_noise((BATCH, side, side, config.in_channels)))
    text = jnp.asarray(_noise((BATCH, TEXT, config.cross_attention_dim)))
    users, scale = jnp.asarray(_noise((BATCH, USER_DIM))), jnp.ones(BATCH)
    predict = jax.jit(lambda unet, latents, contexts: unet(latents, jnp.full((BATCH,), 500.0), contexts))

    def step(contexts) -> None:
        jax.block_until_ready(predict(unet, latents, contexts))

    contexts = {"base": jax.jit(UNet.context)(unet, text)}
    # Computed once per generation, and so outside of the measured step.
    contexts |= {
        kind: jax.jit(lambda adapter, unet: adapter(unet, text, users, scale))(adapter, unet)
        for kind, adapter in adapters.items()
    }
    return {name: functools.partial(step, each) for name, each in contexts.items()}


def _torch_ways(config: UNetConfig, side: int, adapters: dict[str, Adapter]) -> dict[str, Callable[[], None]]:
    try:
        import torch
        from diffusers import UNet2DConditionModel

        from psa_jax.torch.adapter import empty_adapter
        from psa_jax.torch.processors import attach, cross_attentions
    except ImportError as error:
        raise PSAError(f"psa-jax bench generate compares with torch ({error}); pip install 'psa_jax[torch]'") from error

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(_noise(shape, scale))

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_json("UNet2DConditionModel", config))
    unet.load_state_dict({n: tensor(*p.shape, scale=0.02) for n, p in unet.state_dict().items()}, assign=True)
    unet.eval()
    latents = tensor(BATCH, config.in_channels, side, side)
    text = tensor(BATCH, TEXT, config.cross_attention_dim)
    users, scale = tensor(BATCH, USER_DIM), torch.ones(BATCH)
    plain = dict(unet.attn_processors)

    def step(processors, states) -> None:
        unet.set_attn_processor(dict(processors))
        with torch.inference_mode():
            unet(latents, 500, states, return_dict=False)

    ways = {"base": functools.partial(step, plain, text)}
    for kind, adapter in adapters.items():
        ours = empty_adapter(adapter.config)
        tensors = {n: torch.from_numpy(t.copy()) for n, t in to_file(adapter).items()}
        ours.load_state_dict(tensors, assign=True)
        with torch.inference_mode():
            made = ours(text, users, scale)
        if isinstance(made, torch.Tensor):
            ways[kind] = functools.partial(step, plain, made)
            continue
        unet.set_attn_processor(dict(plain))
        for processor, context in zip(attach(unet), made, strict=True):
            processor.context = context
        ways[kind] = functools.partial(step, dict(unet.attn_processors), text)
    token = tensor(BATCH, 1, config.cross_attention_dim)
    original = {name: _original(token, layer.inner_dim, tensor) for name, layer in cross_attentions(unet).items()}
    ways["original"] = functools.partial(step, plain | original, text)
    return ways


def _original(token, width: int, tensor: Callable[..., Any]):
    """Attention processor of the torch original: projects and attends to the user token in every step."""
    import torch.nn.functional as F

    to_k, to_v = (tensor(width, token.shape[-1], scale=0.02) for _ in range(2))

    def attend(query, key, value, heads: int):
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            text = encoder_hidden_states
            query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            out = attend(query, key, value, attn.heads)
            out = out + attend(query, F.linear(token, to_k), F.linear(token, to_v), attn.heads)
            return attn.to_out[1](attn.to_out[0](out))

    return Processor()
