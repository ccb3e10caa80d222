"""The user adapter in torch: the user's part of each cross-attention, computed once for all steps.

    z = LayerNorm(reshape(W_p u + b_p, [T, C]))

    published   o + s·attn(Q, W_k z, W_v z)
    text        attn(Q, K, V + s·attn(W_q e, W_k z, W_v z))
    concept     o + s·attn(W_q o, W_k z, W_v z)
    prompt      e + s·W_o attn(W_q e, W_k z, W_v z), before the UNet
    rewrite     attn(Q, K, V + s·g·W_o gelu(W_1 e))         g = attn(W_q e, W_k z, W_v z), one number a head
    edit        e + s·g·(W_o gelu(W_1 m + b_1) + b_o), before the UNet, with the same g, or that by categories
                (`psa_jax.models.gates`); m is e, or with `mixing` e + W_mo attn(W_mq n, W_mk [n, z], W_mv [n, z]) with
                n = e of mean 0 and variance 1

With `config.pooled`, edit changes SDXL's pooled text q as well: q + s·g_q·(W_p2 gelu(W_p1 n + b_p1) + b_p2), with n = q
of mean 0 and variance 1. g_q is the gate by categories, or each head's largest gate over the tokens.

o is the text attention's output, e the text states, s the scale. Parameters have the names of the native file.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_jax.errors import PSAError
from psa_jax.models.adapter_config import GATE_HIDDEN, PLAIN, AdapterConfig
from psa_jax.profiles.schema import CATEGORIES


class Context(NamedTuple):
    """The user's part of one cross-attention. It does not depend on the step.

    Attributes:
      text_value: added to the text values, [batch, text or 1, width]: s·attn(W_q e, W_k z, W_v z), or what `rewrite`
        adds.
      value: s·W_v z [batch, T, width], the values of an attention to the user tokens.
      key: W_k z [batch, T, width of W_k]; None for a single token, over which attention is `value`.
      query: W_q [width of W_k, width], applied to the text attention's output; None for the image queries.
    """

    text_value: Tensor | None = None
    value: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention softmax(QKᵀ/√d)·V.

    Args:
      query: [batch, n, width].
      key: [batch, m, width].
      value: [batch, m, width of V].
      heads: their number.
      mask: added to the logits, broadcast to [batch, heads, n, m].

    Returns:
      [batch, n, width of V].
    """

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class UserProjection(nn.Module):
    """Projection of a user embedding to user tokens z = LayerNorm(reshape(W_p u + b_p, [T, C]))."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.user_dim, config.tokens * config.cross_dim)
        self.norm = nn.LayerNorm(config.cross_dim)

    def forward(self, user: Tensor) -> Tensor:
        """User tokens [batch, T, C] of user embeddings [batch, D]."""
        return self.norm(self.proj(user).unflatten(-1, (-1, *self.norm.normalized_shape)))


class UserAdapter(nn.Module):
    """User adapter with all its parameters, in float32.

    Attributes:
      config: sizes.
      is_prompt: the kind acts before the UNet; its output is new text states.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.is_prompt = config.before_unet
        if config.by_categories:
            self.user_gate = _hidden_layer(config.user_dim)
            self.prompt_gate = _hidden_layer(config.cross_dim)
        else:
            self.user_proj = UserProjection(config)
        places = [_projections(config, *site) for site in config.adapter_sites]
        if self.is_prompt:
            (self.prompt_adapter,) = places
        else:
            self.psa_adapter = nn.ModuleList(places)
        self.requires_grad_(False)

    def forward(
        self, text: Tensor, user: Tensor, scale: Tensor, pooled: Tensor | None = None
    ) -> list[Context] | Tensor | tuple[list[Context] | Tensor, Tensor]:
        """The user's part of every cross-attention.

        Args:
          text: text states e [batch, text, C].
          user: user embeddings [batch, D].
          scale: strengths s [batch]; 0 is the base model.
          pooled: SDXL's pooled text [batch, P]; adapters that edit it need it.

        Returns:
          A `Context` for each cross-attention. The kinds `prompt` and `edit` return new text states [batch, text, C],
          which any pipeline takes as `prompt_embeds`. With `pooled` a pair, of this and of the new pooled text, for
          `pooled_prompt_embeds`; it is the old one unless the adapter edits it.

        Raises:
          PSAError: an adapter that edits the pooled text, and none or one of another width.
        """
        if self.config.by_categories:
            return self.edit(text, self.bans(user), scale, pooled)
        self._check_pooled(pooled)
        z, s = self.user_proj(user), scale[:, None, None]
        if not self.is_prompt:
            made = [
                self._context(layer, text, z, s, heads)
                for layer, (_, heads) in zip(self.psa_adapter, self.config.layers, strict=True)
            ]
            return made if pooled is None else (made, pooled)
        layer, ((_, heads),) = self.prompt_adapter, self.config.adapter_sites
        attended = _user_attention(layer, text, z, heads)
        if self.config.rewrites:
            made = text + s * _gated(attended, _states(layer, _mixed(layer, text, z, heads)))
        else:
            made = text + s * layer["to_out"](attended)
        return made if pooled is None else (made, self._edit_pooled(pooled, attended, scale))

    def bans(self, user: Tensor) -> Tensor:
        """b_k [batch, 7]: how sure the gate by categories is that each user bans each category.

        Args:
          user: user embeddings [batch, D].
        """
        return torch.sigmoid(self.user_gate(user.float()))

    def gates(self, text: Tensor, bans: Tensor) -> Tensor:
        """p_k·b_k [batch, 7]: how much of each category the prompts ask for and the users ban.

        Args:
          text: text states [batch, text, C].
          bans: as `bans` gives them.
        """
        return torch.sigmoid(torch.logsumexp(self.prompt_gate(text.float()), dim=1)) * bans

    def edit(
        self, text: Tensor, bans: Tensor, scale: Tensor, pooled: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """New text states [batch, text, C] of an adapter with the gate by categories.

        Args:
          text: text states [batch, text, C].
          bans: b_k of each user [batch, 7].
          scale: strengths s [batch].
          pooled: as for the adapter itself; the result is then a pair.

        Raises:
          PSAError: as the adapter itself.
        """
        self._check_pooled(pooled)
        ((_, heads),) = self.config.adapter_sites
        gate = 1 - torch.prod(1 - self.gates(text, bans), dim=-1)
        mixed = _mixed(self.prompt_adapter, text, None, heads)
        made = text + (scale * gate)[:, None, None] * _states(self.prompt_adapter, mixed)
        return made if pooled is None else (made, self._edit_pooled(pooled, gate[:, None, None], scale))

    def _check_pooled(self, pooled: Tensor | None) -> None:
        width = self.config.pooled
        if width and pooled is None:
            raise PSAError(
                "the adapter edits the pooled text as well, and none was given; give pooled_prompt_embeds, too, and "
                "draw with both that come back"
            )
        if width and pooled.shape[-1] != width:
            raise PSAError(f"the adapter edits a pooled text of {width} numbers, this one has {pooled.shape[-1]}")

    def _edit_pooled(self, pooled: Tensor, gates: Tensor, scale: Tensor) -> Tensor:
        """New pooled text [batch, P] by gates [batch, text or 1, heads or 1]; the old one without an edit."""
        if not self.config.pooled:
            return pooled
        layer = self.prompt_adapter
        normal = F.layer_norm(pooled.float(), pooled.shape[-1:], eps=1e-5).to(pooled.dtype)
        made = layer["pooled_out"](F.gelu(layer["pooled_hidden"](normal)))
        return pooled + scale[:, None] * _gated(gates.amax(dim=1), made)

    def _context(self, layer: nn.ModuleDict, text: Tensor, z: Tensor, s: Tensor, heads: int) -> Context:
        if self.config.kind == "text":
            return Context(text_value=s * _user_attention(layer, text, z, heads))
        if self.config.rewrites:
            return Context(text_value=s * _rewrite(layer, text, z, heads))
        key = layer["to_k_user"](z) if "to_k_user" in layer else None
        query = layer["to_q_user"][0].weight if "to_q_user" in layer else None
        return Context(value=s * layer["to_v_user"](z), key=key, query=query)


def _projections(config: AdapterConfig, width: int, heads: int) -> nn.ModuleDict:
    """Projections of one adapter site under the file's names."""
    linear = {name: nn.Linear(p.inner, p.outer, bias=p.bias) for name, p in config.projections(width, heads).items()}
    if config.before_unet:
        return nn.ModuleDict({name if name in PLAIN else f"{name}_user": m for name, m in linear.items()})
    return nn.ModuleDict({f"{name}_user": nn.Sequential(m) for name, m in linear.items()})


def _rewrite(layer: nn.ModuleDict, text: Tensor, z: Tensor, heads: int) -> Tensor:
    """g·(W_o gelu(W_1 m + b_1) + b_o): each head's part of the new states times its gate."""
    return _gated(_user_attention(layer, text, z, heads), _states(layer, _mixed(layer, text, z, heads)))


def _gated(gates: Tensor, states: Tensor) -> Tensor:
    """Gates [..., heads], each times its head's part of the states [..., width]."""
    return (gates[..., None] * states.unflatten(-1, (gates.shape[-1], -1))).flatten(-2)


def _states(layer: nn.ModuleDict, text: Tensor) -> Tensor:
    """W_o gelu(W_1 m + b_1) + b_o."""
    hidden, out = ((layer[n] if n in layer else layer[f"{n}_user"]) for n in ("hidden", "to_out"))
    return out(F.gelu(hidden(text)))


def _mixed(layer: nn.ModuleDict, text: Tensor, z: Tensor | None, heads: int) -> Tensor:
    """The states m that the hidden layer sees: e, or e and what a self-attention over e and user tokens adds to it."""
    if "mix_q" not in layer:
        return text
    normal = F.layer_norm(text.float(), text.shape[-1:], eps=1e-5).to(text.dtype)
    seen = normal if z is None else torch.cat([normal, z.to(text.dtype)], dim=1)
    return text + layer["mix_out"](attend(layer["mix_q"](normal), layer["mix_k"](seen), layer["mix_v"](seen), heads))


def _hidden_layer(width: int) -> nn.Sequential:
    """One half of the gate by categories: `width` to a logit for each category."""
    return nn.Sequential(nn.Linear(width, GATE_HIDDEN), nn.GELU(), nn.Linear(GATE_HIDDEN, len(CATEGORIES)))


def _user_attention(layer: nn.ModuleDict, text: Tensor, z: Tensor, heads: int) -> Tensor:
    """attn(W_q e, W_k z, W_v z); the constant W_v z for a single token."""
    value = layer["to_v_user"](z)
    if "to_k_user" not in layer:
        return value
    return attend(layer["to_q_user"](text), layer["to_k_user"](z), value, heads)


def empty_adapter(config: AdapterConfig) -> UserAdapter:
    """Adapter on the meta device, without memory, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"):
        return UserAdapter(config)
