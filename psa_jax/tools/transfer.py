"""`psa-jax export` and `psa-jax import`: adapter files out and in."""

import json
from argparse import Namespace
from pathlib import Path

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import load_adapter, read_metadata, save_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.training.loop import ADAPTER_FILE

STRUCTURE = ("kind", "tokens", "user_dim", "cross_dim", "layers", "qk_dim")


def export(args: Namespace) -> int:
    """Writes the adapter of a run folder or of a native file as a native file."""
    source = args.adapter / ADAPTER_FILE if args.adapter.is_dir() else args.adapter
    about = read_metadata(source)
    if not about:
        raise PSAError(f"{source}: not a file that psa-jax train wrote; bring it in with psa-jax import first")
    adapter = load_adapter(source, tuple((w, h) for w, h in about["layers"]), about["cross_dim"])
    return _save(adapter, args.out, about)


def import_(args: Namespace) -> int:
    """Reads a native file, or a safetensors file of the torch original, for a base model; writes a native file."""
    unet = load_stable_diffusion(args.model).unet.config
    adapter = load_adapter(args.file, unet.cross_attentions, unet.cross_attention_dim)
    return _save(adapter, args.out, read_metadata(args.file))


def _save(adapter: Adapter, out: Path, about: dict) -> int:
    if out.exists():
        raise PSAError(f"{out}: exists already; give another --out")
    save_adapter(adapter, out, {key: value for key, value in about.items() if key not in STRUCTURE})
    config = adapter.config
    print(json.dumps({"adapter": str(out), "kind": config.kind, "tokens": config.tokens, "user_dim": config.user_dim}))
    return 0
