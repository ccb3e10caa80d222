"""Kinds and sizes of user adapters. Imports neither JAX nor torch: both build their modules from what is said here."""

import dataclasses
from typing import NamedTuple

from psa_jax.errors import PSAError
from psa_jax.models.config import UNetConfig

PROMPT_HEADS = 8
UNCONDITIONAL = ("off", "zeros", "same")
"""User embedding on the unconditional side of guidance: adapter off, zeros, or the same user as on the other side."""
Layers = tuple[tuple[int, int], ...]
"""(width, heads) of every cross-attention, in diffusers' `attn_processors` order."""


class AdapterKind(NamedTuple):
    """How an adapter kind acts.

    Attributes:
      query_source: what W_q projects: nothing (the UNet's "image" queries are used), the "text" states, or the
        "attention" output of the layer.
      before_unet: it acts once, on the text states; the others act in every cross-attention.
    """

    query_source: str
    before_unet: bool = False


ADAPTER_KINDS = {
    "published": AdapterKind("image"),
    "text": AdapterKind("text"),
    "concept": AdapterKind("attention"),
    "prompt": AdapterKind("text", before_unet=True),
}


def check_kind(kind: str, qk_dim: int | None) -> None:
    """Raises PSAError for a kind that there is not, or one that has no such width."""
    if kind not in ADAPTER_KINDS:
        raise PSAError(f"adapter kind {kind!r} is unknown (one of {', '.join(ADAPTER_KINDS)})")
    if qk_dim is not None and ADAPTER_KINDS[kind].query_source == "image":
        raise PSAError(
            f"adapter.qk_dim is {qk_dim}, which does not apply to the {kind} kind: it asks with the UNet's own "
            "queries; leave it out"
        )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an adapter.

    Attributes:
      kind: a key of `ADAPTER_KINDS`.
      tokens: user tokens T.
      user_dim: length D of a user embedding.
      cross_dim: cross-attention width C of the base model.
      layers: the base model's.
      qk_dim: width of W_q and W_k; None for full width.
    """

    kind: str
    tokens: int
    user_dim: int
    cross_dim: int
    layers: Layers
    qk_dim: int | None = None

    def __post_init__(self):
        check_kind(self.kind, self.qk_dim)
        if self.tokens < 1:
            raise PSAError(f"adapter tokens must be at least 1, got {self.tokens}")
        if self.qk_dim is None:
            return
        heads = {heads for _, heads in self.adapter_sites}
        if self.qk_dim < 1 or any(self.qk_dim % h for h in heads):
            raise PSAError(
                f"qk_dim {self.qk_dim} is no positive multiple of the heads of every layer ({sorted(heads)})"
            )

    @classmethod
    def for_unet(
        cls, unet: UNetConfig, *, user_dim: int, kind: str = "text", tokens: int = 4, qk_dim: int | None = None
    ) -> "AdapterConfig":
        """The adapter that fits a UNet."""
        return cls(kind, tokens, user_dim, unet.cross_attention_dim, unet.cross_attentions, qk_dim)

    @property
    def before_unet(self) -> bool:
        return ADAPTER_KINDS[self.kind].before_unet

    @property
    def adapter_sites(self) -> Layers:
        """(width, heads) of every place where the adapter has projections."""
        return ((self.cross_dim, prompt_heads(self.cross_dim)),) if self.before_unet else self.layers

    def projections(self, width: int) -> dict[str, tuple[int, int]]:
        """Kernels of the projections in a place of this width, as name -> (in, out)."""
        qk = width if self.qk_dim is None else self.qk_dim
        found = {"to_v": (self.cross_dim, width)}
        if self.tokens > 1:
            found["to_k"] = (self.cross_dim, qk)
            query_source = ADAPTER_KINDS[self.kind].query_source
            if query_source != "image":
                found["to_q"] = (width if query_source == "attention" else self.cross_dim, qk)
        if self.before_unet:
            found["to_out"] = (width, self.cross_dim)
        return found


def prompt_heads(cross_dim: int) -> int:
    """Heads of the `prompt` kind: the most, up to 8, that divide the width."""
    return next(h for h in range(PROMPT_HEADS, 0, -1) if not cross_dim % h)
