"""Sees whether SDXL's UNet draws with the pooled text that the adapter made: it goes around the cross-attentions."""

import torch
from torch import Tensor, nn

from psa_jax.errors import PSAError


class PooledWatch:
    """A hook in front of the UNet's layer that takes the pooled text.

    Args:
      unet: UNet2DConditionModel of diffusers, of SDXL.
      width: of the pooled text.

    Attributes:
      seen: input of the layer in the last run, [batch, P and more]; written only.
    """

    def __init__(self, unet: nn.Module, width: int):
        self.seen: Tensor | None = None
        self._width = width
        self._handle = unet.add_embedding.register_forward_pre_hook(self._look)

    def _look(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen = inputs[0]

    def remove(self) -> None:
        """Takes the hook out of the UNet."""
        self._handle.remove()

    def check_run(self, pooled: Tensor) -> None:
        """Checks that the layer ran since the last check, with the given pooled text [batch, P].

        Raises:
          PSAError: it did not, so the pictures are not for the user.
        """
        seen, self.seen = self.seen, None
        wanted = None if seen is None else pooled.to(seen)
        if seen is None or seen.shape[0] != len(wanted) or not torch.equal(seen[:, : self._width], wanted):
            raise PSAError(
                "the UNet was given another pooled text than the adapter made; do not change pooled_prompt_embeds, "
                "add_text_embeds or the guidance during a call"
            )
