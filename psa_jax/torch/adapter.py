"""The user adapter in torch: what a user adds to each cross-attention, worked out once for all steps.

    z = LayerNorm(reshape(W_p u + b_p, [T, C]))

    published   o + s·attn(Q, W_k z, W_v z)
    text        attn(Q, K, V + s·attn(W_q e, W_k z, W_v z))
    concept     o + s·attn(W_q o, W_k z, W_v z)
    prompt      e + s·W_o attn(W_q e, W_k z, W_v z), before the UNet

o is the text attention's answer, e the text states, s the scale. Parameters have the names of the native file.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_jax.models.adapter_config import AdapterConfig


class Context(NamedTuple):
    """What a user adds to one cross-attention. None of it depends on the step.

    Attributes:
      text_value: added to the text values: s·attn(W_q e, W_k z, W_v z) [batch, text or 1, width].
      value: s·W_v z [batch, T, width], for an attention of its own.
      key: W_k z [batch, T, width of W_k]; None where there is one token and the answer is `value`.
      query: W_q [width of W_k, width], for the text attention's answer to ask with; None: the image's queries ask.
    """

    text_value: Tensor | None = None
    value: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V with the heads split off and joined again: [batch, n, width of V]."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class UserProjection(nn.Module):
    """User embedding [batch, D] to user tokens z [batch, T, C]."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.user_dim, config.tokens * config.cross_dim)
        self.norm = nn.LayerNorm(config.cross_dim)

    def forward(self, user: Tensor) -> Tensor:
        return self.norm(self.proj(user).unflatten(-1, (-1, *self.norm.normalized_shape)))


class UserAdapter(nn.Module):
    """All parameters of an adapter, in float32.

    Called with text states e [batch, text, C], users [batch, D] and scales [batch], it gives a `Context` for each
    cross-attention; the `prompt` kind gives new text states instead (`is_prompt`), which any pipeline takes as
    `prompt_embeds`.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.is_prompt = config.before_unet
        self.user_proj = UserProjection(config)
        places = [_projections(config, width) for width, _ in config.adapter_sites]
        if self.is_prompt:
            (self.prompt_adapter,) = places
        else:
            self.psa_adapter = nn.ModuleList(places)
        self.requires_grad_(False)

    def forward(self, text: Tensor, user: Tensor, scale: Tensor) -> list[Context] | Tensor:
        z, s = self.user_proj(user), scale[:, None, None]
        if self.is_prompt:
            ((_, heads),) = self.config.adapter_sites
            return text + s * self.prompt_adapter["to_out"](_user_attention(self.prompt_adapter, text, z, heads))
        return [
            self._context(layer, text, z, s, heads)
            for layer, (_, heads) in zip(self.psa_adapter, self.config.layers, strict=True)
        ]

    def _context(self, layer: nn.ModuleDict, text: Tensor, z: Tensor, s: Tensor, heads: int) -> Context:
        if self.config.kind == "text":
            return Context(text_value=s * _user_attention(layer, text, z, heads))
        key = layer["to_k_user"](z) if "to_k_user" in layer else None
        query = layer["to_q_user"][0].weight if "to_q_user" in layer else None
        return Context(value=s * layer["to_v_user"](z), key=key, query=query)


def _projections(config: AdapterConfig, width: int) -> nn.ModuleDict:
    """Those of one place, under the file's names: all but `to_out` belong to the user."""
    linear = {name: nn.Linear(*sizes, bias=False) for name, sizes in config.projections(width).items()}
    if config.before_unet:
        return nn.ModuleDict({name if name == "to_out" else f"{name}_user": m for name, m in linear.items()})
    return nn.ModuleDict({f"{name}_user": nn.Sequential(m) for name, m in linear.items()})


def _user_attention(layer: nn.ModuleDict, text: Tensor, z: Tensor, heads: int) -> Tensor:
    """attn(W_q e, W_k z, W_v z); the constant W_v z where there is one token."""
    value = layer["to_v_user"](z)
    if "to_k_user" not in layer:
        return value
    return attend(layer["to_q_user"](text), layer["to_k_user"](z), value, heads)


def empty_adapter(config: AdapterConfig) -> UserAdapter:
    """The adapter without its numbers, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"):
        return UserAdapter(config)
