"""Kinds and sizes of user adapters. Imports neither JAX nor torch; the modules of both are built from these records."""

import dataclasses
from typing import NamedTuple

from psa_jax.errors import PSAError
from psa_jax.models.config import UNetConfig

PROMPT_HEADS = 8
"""Largest number of attention heads of the `prompt` kind."""
UNCONDITIONAL = ("off", "zeros", "same")
"""User embedding on the unconditional side of guidance: adapter off, zeros, or the same user as on the other side."""
Layers = tuple[tuple[int, int], ...]
"""(width, heads) of every cross-attention, in diffusers' `attn_processors` order."""


class AdapterKind(NamedTuple):
    """Where an adapter kind takes its queries from, and where it acts.

    Attributes:
      query_source: "image": the UNet's own queries, without a W_q; "text": W_q projects the text states; "attention":
        W_q projects the output of the layer's text attention.
      before_unet: acts once, on the text states; the other kinds act in every cross-attention.
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
    """Checks an adapter kind and the width of its queries and keys.

    Args:
      kind: a key of `ADAPTER_KINDS`.
      qk_dim: width of W_q and W_k; None for full width.

    Raises:
      PSAError: an unknown kind, or a width for a kind without W_q.
    """
    if kind not in ADAPTER_KINDS:
        raise PSAError(f"adapter kind {kind!r} is unknown (one of {', '.join(ADAPTER_KINDS)})")
    if qk_dim is not None and ADAPTER_KINDS[kind].query_source == "image":
        raise PSAError(
            f"adapter.qk_dim is {qk_dim}, which does not apply to the {kind} kind: it uses the UNet's own "
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
      layers: (width, heads) of the base model's cross-attentions.
      qk_dim: width of W_q and W_k; None for full width.

    Raises:
      PSAError: an unknown kind, no token, or a `qk_dim` that the heads do not divide.
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
        """Sizes of an adapter for a UNet.

        Args:
          unet: the base model's configuration.
          user_dim: length D of a user embedding.
          kind, tokens, qk_dim: as the attributes.

        Raises:
          PSAError: as the constructor.
        """
        return cls(kind, tokens, user_dim, unet.cross_attention_dim, unet.cross_attentions, qk_dim)

    @property
    def before_unet(self) -> bool:
        """Whether the adapter acts once, on the text states, before the UNet."""
        return ADAPTER_KINDS[self.kind].before_unet

    @property
    def adapter_sites(self) -> Layers:
        """(width, heads) of every site where the adapter has projections: the cross-attentions, or one (`prompt`)."""
        return ((self.cross_dim, prompt_heads(self.cross_dim)),) if self.before_unet else self.layers

    def projections(self, width: int) -> dict[str, tuple[int, int]]:
        """Kernels of the projections at a site of this width, as name -> (in, out)."""
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
    """Attention heads of the `prompt` kind: the largest number up to `PROMPT_HEADS` that divides the width."""
    return next(h for h in range(PROMPT_HEADS, 0, -1) if not cross_dim % h)
