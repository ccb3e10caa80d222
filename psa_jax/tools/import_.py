"""`psa-jax import`: an adapter of the torch original as a native file. The last line on stdout is JSON."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.files import check_new
from psa_jax.interop.adapter_file import (
    ADAPTER_FILE,
    PICKLES,
    Tensors,
    fitting_config,
    read_metadata,
    read_tensors,
    write_native,
)
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.upstream import read_bin
from psa_jax.models.config import model_family


def run(args: Namespace) -> int:
    """Reads a native file, or the torch original's .bin or safetensors, for a base model; writes a native file."""
    check_new(args.out, "give another --out")
    if args.file.is_dir():
        raise PSAError(f"{args.file}: a folder; give the file in it, such as {args.file / ADAPTER_FILE}")
    unet = BaseModel.from_config(vars(args)).unet_config()
    about, tensors = ({}, read_bin(args.file)) if args.file.suffix in PICKLES else _read_safetensors(args.file)
    config = fitting_config(args.file, tensors, about, unet.cross_attentions, unet.cross_attention_dim)
    write_native(tensors, config, args.out, about or {"family": model_family(unet)})
    result = {"adapter": str(args.out), "format": "native"}
    print(json.dumps(result | {name: getattr(config, name) for name in ("kind", "tokens", "user_dim")}))
    return 0


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Tensors]:
    about, tensors = read_metadata(path), read_tensors(path)
    return about, {name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()}
