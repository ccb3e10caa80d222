"""Export of UNet and adapter as one graph (`torch.export`), for engines such as TensorRT."""

from pathlib import Path

import torch
from torch import Tensor, nn

from psa_jax.errors import PSAError
from psa_jax.files import check_new
from psa_jax.torch.adapter import UserAdapter
from psa_jax.torch.processors import attach


class AdaptedUNet(nn.Module):
    """UNet and adapter as one function of plain tensors. Replaces the UNet's cross-attention processors.

    Args:
      unet: UNet2DConditionModel of diffusers.
      adapter: is moved to the UNet's device.
    """

    def __init__(self, unet: nn.Module, adapter: UserAdapter):
        super().__init__()
        self.unet, self.adapter = unet, adapter.to(unet.device)
        self._processors = [] if adapter.is_prompt else attach(unet)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        user: Tensor,
        scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Prediction of the UNet with the adapter.

        Args:
          sample: noisy latents [batch, 4, h, w].
          timestep: one for all pictures [], or one for each [batch].
          text: text states [batch, text, C].
          user: user embeddings [batch, D].
          scale: strengths [batch]; 0 is the base model.
          text_embeds: pooled text [batch, P], for SDXL; edited where the adapter edits it.
          time_ids: [batch, 6], for SDXL.

        Returns:
          [batch, 4, h, w].

        Raises:
          PSAError: an adapter that edits the pooled text, and none or one of another width.
        """
        if self.adapter.config.pooled and text_embeds is not None:
            made, edited = self.adapter(text.float(), user, scale, text_embeds.float())
            text_embeds = edited.to(text_embeds.dtype)
        else:
            made = self.adapter(text.float(), user, scale)
        if isinstance(made, Tensor):
            text = made.to(text.dtype)
        else:
            for processor, context in zip(self._processors, made, strict=True):
                processor.context = type(context)(*(None if part is None else part.to(sample) for part in context))
        added = None if time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        try:
            return self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
        finally:
            for processor in self._processors:
                processor.context, processor.text = None, None


def export_unet(unet: nn.Module, adapter: UserAdapter, path: str | Path, *example: Tensor) -> None:
    """Writes UNet and adapter to a `.pt2` file.

    `torch.export.load(path).module()(*inputs)` runs it without diffusers and psa_jax.

    Args:
      unet, adapter: as in `AdaptedUNet`. The UNet's processors are put back afterwards.
      path: a new file.
      example: inputs of `AdaptedUNet.forward`; the graph is for their shapes and types.

    Raises:
      PSAError: another file name, or an existing file.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise PSAError(f"{path}: name it .pt2, which torch.export.save asks for")
    check_new(path)
    before = dict(unet.attn_processors)
    try:
        with torch.no_grad():
            program = torch.export.export(AdaptedUNet(unet, adapter).eval(), example)
        torch.export.save(program, path)
    finally:
        unet.set_attn_processor(before)
