"""A node for ComfyUI: conditioning and a user in, that user's conditioning out. For the kinds before the UNet.

Make a file `custom_nodes/psa.py` in ComfyUI's folder with the one line

    from psa_jax.torch.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

and connect the node between `CLIP Text Encode` of the positive prompt and the sampler. It follows ComfyUI's contract
for nodes and imports none of its code.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psa_jax.errors import PSAError
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.torch.adapter import UserAdapter
from psa_jax.torch.files import adapter_file, load_adapter

_POOLED = "pooled_output"
"""ComfyUI's name of SDXL's pooled text."""
Conditioning = list[Any]
"""ComfyUI's: for each prompt a list of text states [batch, text, C] and a dict with what else there is."""


class UserConditioning:
    """The node. Errors are shown by ComfyUI, and no picture is made."""

    CATEGORY = "conditioning"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"
    DESCRIPTION = "Changes a prompt's conditioning as a user's profile asks for (kinds prompt and edit of psa_jax)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        """The node's inputs, as ComfyUI asks for them."""
        text = ("STRING", {"default": ""})
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "adapter": ("STRING", {"default": "psa_adapter.safetensors"}),
                "scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            },
            "optional": {"profile": text, "user": text, "table": text},
        }

    def apply(
        self, conditioning: Conditioning, adapter: str, scale: float, profile: str = "", user: str = "", table: str = ""
    ) -> tuple[Conditioning]:
        """The conditioning for the user.

        Args:
          conditioning: of the prompt.
          adapter: native file or its folder.
          scale: strength s; 0 is the base model.
          profile: a profile as JSON; or else
          user, table: an id and the file of its embedding table.

        Returns:
          The new conditioning, as ComfyUI's nodes return their outputs.

        Raises:
          PSAError: an adapter of another kind, no user, or a base model of another width.
        """
        path = adapter_file(adapter)
        found = path.stat()
        loaded, about = _opened(path, found.st_mtime_ns, found.st_size)
        known = Path(table) if table else None
        embedding = user_embedding(path, about, profile=profile or None, user=user or None, table=known)
        return ([self._adapted(loaded, text, more, embedding, scale) for text, more in conditioning],)

    @staticmethod
    @torch.no_grad()
    def _adapted(
        adapter: UserAdapter, text: Tensor, more: dict[str, Any], embedding: np.ndarray, scale: float
    ) -> list[Any]:
        """One prompt's new text states, and the dict beside them, with the new pooled text where it is edited."""
        wanted = adapter.config.cross_dim
        if text.shape[-1] != wanted:
            raise PSAError(f"the conditioning has width {text.shape[-1]}; the adapter is for a base model of {wanted}")
        users = torch.from_numpy(np.array(embedding)).expand(len(text), -1)
        states, strength = text.float().cpu(), torch.full((len(text),), float(scale))
        if not adapter.config.pooled:
            new, edited = adapter(states, users, strength), {}
        elif (pooled := more.get(_POOLED)) is None:
            raise PSAError(
                f"the adapter edits the pooled text as well, and the conditioning has no {_POOLED}; connect the node "
                "behind a text encoder of SDXL"
            )
        else:
            new, pooled_new = adapter(states, users, strength, pooled.float().cpu())
            edited = {_POOLED: pooled_new.to(pooled)}
        if not all(torch.isfinite(one).all() for one in (new, *edited.values())):
            raise PSAError("the new conditioning is not finite; use a smaller scale")
        return [new.to(text), more | edited]


@functools.lru_cache(maxsize=4)
def _opened(path: Path, changed: int, size: int) -> tuple[UserAdapter, dict[str, Any]]:
    """The adapter and its metadata; a file that was written again since is read again."""
    del changed, size  # of the file, for the cache
    loaded, about = load_adapter(path)
    if not loaded.is_prompt:
        raise PSAError(
            f"{path}: the {loaded.config.kind} kind acts inside the UNet; ComfyUI's conditioning takes prompt and edit"
        )
    return loaded, about


NODE_CLASS_MAPPINGS = {"PSAUserConditioning": UserConditioning}
NODE_DISPLAY_NAME_MAPPINGS = {"PSAUserConditioning": "User conditioning (PSA)"}
