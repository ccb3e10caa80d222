"""Files of the torch original, `psa_adapter.bin`: reading them, and writing adapters that its format can express."""

from pathlib import Path

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.files import replacing
from psa_jax.interop.adapter_file import Tensors
from psa_jax.interop.unpickle import read_state
from psa_jax.models.adapter_config import AdapterConfig

GROUPS = ("psa_adapter", "user_proj")


def read_bin(path: Path) -> Tensors:
    """Tensors of a `psa_adapter.bin` in float32, under the native file's names. The pickle's code is not executed.

    Raises:
      PSAError: not such a file, or an unsafe or damaged pickle.
    """
    state = read_state(path)
    if sorted(state) != sorted(GROUPS) or not all(isinstance(state[group], dict) for group in GROUPS):
        raise PSAError(f"{path}: not an adapter of the torch original, which holds {' and '.join(GROUPS)}")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which is refused with the tensor's name
        return {f"{group}.{name}": t.astype(np.float32) for group in GROUPS for name, t in state[group].items()}


def write_bin(tensors: Tensors, path: Path) -> None:
    """Writes a `psa_adapter.bin`, whole or not at all. Needs torch.

    Args:
      tensors: of `as_published`.
      path: of the file.

    Raises:
      PSAError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise PSAError(f"{path}: writing .bin needs torch; pip install 'psa_jax[torch]'") from error
    groups = {
        group: {
            name.removeprefix(f"{group}."): torch.from_numpy(tensor.copy())
            for name, tensor in tensors.items()
            if name.startswith(f"{group}.")
        }
        for group in GROUPS
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(groups, temporary)


def as_published(tensors: Tensors, config: AdapterConfig, where: Path, format_: str) -> Tensors:
    """Tensors of a native file as those of a `published` adapter.

    With one token, all kinds in the cross-attentions are the same constant s·W_v z, so each is a `published` one.

    Args:
      tensors: of the native file.
      config: the adapter's sizes.
      where: the file, for errors.
      format_: the export format, for errors.

    Raises:
      PSAError: an adapter that no `published` adapter equals.
    """
    constant = config.tokens == 1 and not config.before_unet
    if config.kind != "published" and not constant:
        raise PSAError(
            f"{where}: the {format_} format cannot express kind {config.kind!r} with {config.tokens} tokens; "
            "export it with --format=native and load it with psa_jax.torch (load_psa)"
        )
    keys = {name.replace("to_v", "to_k"): t for name, t in tensors.items() if ".to_v_user." in name}
    return {name: np.zeros_like(value) for name, value in keys.items()} | tensors
