"""Reader of native adapter files for torch."""

from pathlib import Path
from typing import Any

from psa_jax.interop.adapter_file import constant_keys, find_adapter, fitting_config, read_metadata, read_tensors
from psa_jax.models.adapter_config import Layers
from psa_jax.torch.adapter import UserAdapter, empty_adapter


def adapter_file(path: str | Path) -> Path:
    """Path of an adapter's native file; arguments and errors as `find_adapter`."""
    return find_adapter(Path(path))


def load_adapter(
    path: str | Path, layers: Layers | None = None, cross_dim: int | None = None
) -> tuple[UserAdapter, dict[str, Any]]:
    """Adapter of a native file, on the CPU in float32, and the file's metadata.

    Args:
      path: the file, or a folder with it.
      layers, cross_dim: (width, heads) of the base model's cross-attentions, and their width of the text states. None
        takes the file's own; files of the torch original have none.

    Raises:
      PSAError: a damaged file, an adapter for another base model, or missing, extra, misshapen or non-finite tensors.
    """
    path = adapter_file(path)
    about = read_metadata(path)
    tensors = {name: tensor.float() for name, tensor in read_tensors(path, "pt").items()}
    config = fitting_config(path, tensors, about, layers, cross_dim)
    adapter = empty_adapter(config)
    keys = constant_keys(config)
    adapter.load_state_dict({name: t for name, t in tensors.items() if name not in keys}, assign=True)
    return adapter.requires_grad_(False).eval(), about
