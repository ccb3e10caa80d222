"""Kinds and sizes of user adapters. Imports neither JAX nor torch; the modules of both are built from these records."""

import dataclasses
from typing import Any, NamedTuple

from psa_jax.errors import PSAError
from psa_jax.models.config import UNetConfig

PROMPT_HEADS = 8
"""Largest number of attention heads of the kinds that act before the UNet."""
UNCONDITIONAL = ("off", "zeros", "same")
"""User embedding on the unconditional side of guidance: adapter off, zeros, or the same user as on the other side."""
GATES = ("attention", "categories")
"""What decides whether a kind that rewrites acts: an attention to the user tokens, or `psa_jax.models.gates`."""
GATE_HIDDEN = 128
"""Width of the hidden layers of the gate by categories."""
Layers = tuple[tuple[int, int], ...]
"""(width, heads) of every cross-attention, in diffusers' `attn_processors` order."""


class AdapterKind(NamedTuple):
    """Where an adapter kind takes its queries from, what it does, and where.

    Attributes:
      query_source: "image": the UNet's own queries, without a W_q; "text": W_q projects the text states; "attention":
        W_q projects the output of the layer's text attention.
      before_unet: acts once, on the text states; the other kinds act in every cross-attention.
      rewrites: adds a function of the text states, W₂ gelu(W₁ e), times a gate that the attention to the user tokens
        gives; the other kinds add what that attention itself gives.
    """

    query_source: str
    before_unet: bool = False
    rewrites: bool = False


ADAPTER_KINDS = {
    "published": AdapterKind("image"),
    "text": AdapterKind("text"),
    "concept": AdapterKind("attention"),
    "prompt": AdapterKind("text", before_unet=True),
    "rewrite": AdapterKind("text", rewrites=True),
    "edit": AdapterKind("text", before_unet=True, rewrites=True),
}


class Projection(NamedTuple):
    """Sizes of one linear layer of an adapter.

    Attributes:
      inner, outer: width of its input and of its output.
      bias: whether it has one.
    """

    inner: int
    outer: int
    bias: bool = False


def check_kind(kind: str, qk_dim: int | None, hidden: int | None = None) -> None:
    """Checks an adapter kind and the widths that only some kinds have.

    Args:
      kind: a key of `ADAPTER_KINDS`.
      qk_dim: width of W_q and W_k; None for full width.
      hidden: width of the hidden layer W₁; None for the kind's own.

    Raises:
      PSAError: an unknown kind, or a width that it does not have.
    """
    if kind not in ADAPTER_KINDS:
        raise PSAError(f"adapter kind {kind!r} is unknown (one of {', '.join(ADAPTER_KINDS)})")
    if qk_dim is not None and ADAPTER_KINDS[kind].query_source == "image":
        raise PSAError(
            f"adapter.qk_dim is {qk_dim}, which does not apply to the {kind} kind: it uses the UNet's own "
            "queries; leave it out"
        )
    if hidden is not None and not ADAPTER_KINDS[kind].rewrites:
        with_one = ", ".join(name for name, entry in ADAPTER_KINDS.items() if entry.rewrites)
        raise PSAError(
            f"adapter.hidden is {hidden}, which does not apply to the {kind} kind: only {with_one} have a hidden "
            "layer; leave it out"
        )


def check_mixing(kind: str, mixing: bool) -> None:
    """Checks that a kind has the self-attention that it is asked for.

    Raises:
      PSAError: another kind than `edit`.
    """
    if mixing and kind != "edit":
        raise PSAError(f"adapter.mixing is true, which the {kind} kind lacks; use it with adapter.kind=edit")


def check_pooled(kind: str, pooled: int) -> None:
    """Checks that a kind has the edit of the pooled text that it is asked for.

    Args:
      kind: a key of `ADAPTER_KINDS`.
      pooled: width of the pooled text, or in a configuration whether it is edited; 0 or False for no edit.

    Raises:
      PSAError: another kind than `edit`.
    """
    if pooled and kind != "edit":
        raise PSAError(
            f"adapter.pooled is given, which the {kind} kind lacks; set it to false, or use adapter.kind=edit"
        )


def check_gate(kind: str, gate: str, tokens: int, qk_dim: int | None) -> None:
    """Checks a gate, and that the kind has it.

    Raises:
      PSAError: an unknown gate, one that the kind does not have, or user tokens beside the gate by categories.
    """
    if gate not in GATES:
        raise PSAError(f"adapter.gate is {gate!r}; choose {', '.join(GATES)}")
    if gate != "categories":
        return
    if kind != "edit":
        raise PSAError(f"adapter.gate is categories, which the {kind} kind lacks; use it with adapter.kind=edit")
    if tokens or qk_dim is not None:
        raise PSAError(
            f"adapter.gate is categories, which has no user tokens, but adapter.tokens is {tokens} and adapter.qk_dim "
            f"is {qk_dim}; give adapter.tokens=0 and leave qk_dim out"
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
      hidden: width of the hidden layer of the kinds that rewrite; None for C in a cross-attention, 4·C before the UNet.
      gate: one of GATES, for the kinds that rewrite; `categories` for `edit` alone, which then has no user tokens.
      mixing: a self-attention over text states and user tokens before the hidden layer, for `edit` alone.
      pooled: width P of SDXL's pooled text, which is edited as well, for `edit` alone; 0 leaves it as it is.

    Raises:
      PSAError: an unknown kind or gate, no token, or a width that does not fit.
    """

    kind: str
    tokens: int
    user_dim: int
    cross_dim: int
    layers: Layers
    qk_dim: int | None = None
    hidden: int | None = None
    gate: str = "attention"
    mixing: bool = False
    pooled: int = 0

    def __post_init__(self):
        check_kind(self.kind, self.qk_dim, self.hidden)
        check_mixing(self.kind, self.mixing)
        check_pooled(self.kind, self.pooled)
        check_gate(self.kind, self.gate, self.tokens, self.qk_dim)
        if self.tokens < 1 and self.gate != "categories":
            raise PSAError(f"adapter tokens must be at least 1, got {self.tokens}")
        if self.hidden is not None and self.hidden < 1:
            raise PSAError(f"adapter hidden must be at least 1, got {self.hidden}")
        if self.pooled < 0:
            raise PSAError(f"adapter pooled must be at least 0, got {self.pooled}")
        if self.pooled and self.gate == "attention" and self.pooled % (heads := self.adapter_sites[0][1]):
            raise PSAError(
                f"a pooled text of {self.pooled} numbers cannot be divided among the {heads} heads of the gate; use "
                "adapter.gate=categories, or adapter.pooled=false"
            )
        if self.qk_dim is None:
            return
        heads = {heads for _, heads in self.adapter_sites}
        if self.qk_dim < 1 or any(self.qk_dim % h for h in heads):
            raise PSAError(
                f"qk_dim {self.qk_dim} is no positive multiple of the heads of every layer ({sorted(heads)})"
            )

    @classmethod
    def for_unet(
        cls,
        unet: UNetConfig,
        *,
        user_dim: int,
        kind: str = "text",
        tokens: int = 4,
        qk_dim: int | None = None,
        hidden: int | None = None,
        gate: str = "attention",
        mixing: bool = False,
        pooled: bool = False,
    ) -> "AdapterConfig":
        """Sizes of an adapter for a UNet.

        Args:
          unet: the base model's configuration.
          user_dim: length D of a user embedding.
          kind, tokens, qk_dim, hidden, gate, mixing: as the attributes.
          pooled: edit the pooled text as well, whose width is the UNet's.

        Raises:
          PSAError: as the constructor, or a UNet that takes no pooled text.
        """
        sizes = (tokens, user_dim, unet.cross_attention_dim, unet.cross_attentions, qk_dim, hidden, gate, mixing)
        if pooled and not unet.pooled_dim:
            raise PSAError("adapter.pooled is true, but the base model takes no pooled text; set it to false")
        return cls(kind, *sizes, unet.pooled_dim if pooled else 0)

    @property
    def before_unet(self) -> bool:
        """Whether the adapter acts once, on the text states, before the UNet."""
        return ADAPTER_KINDS[self.kind].before_unet

    @property
    def rewrites(self) -> bool:
        """Whether the adapter adds a gated function of the text states."""
        return ADAPTER_KINDS[self.kind].rewrites

    @property
    def zero_kernels(self) -> tuple[str, ...]:
        """Names of the projections that are zero in an untrained adapter."""
        return ("to_out", "pooled_out") if self.before_unet or self.rewrites else ("to_v",)

    @property
    def adapter_sites(self) -> Layers:
        """(width, heads) of every site where the adapter has projections: the cross-attentions, or one before them."""
        return ((self.cross_dim, prompt_heads(self.cross_dim)),) if self.before_unet else self.layers

    def projections(self, width: int, heads: int) -> dict[str, Projection]:
        """The linear layers at a site of this width and number of heads, by name.

        `to_q` and `to_k` are those of the attention to the user tokens, `to_v` its values; for kinds that rewrite, the
        values are one gate a head, and `hidden` and `to_out` are W₁ and W₂. MIXING are those of the self-attention,
        POOLED the W₁ and W₂ of the pooled text.
        """
        qk = width if self.qk_dim is None else self.qk_dim
        found = {"to_v": Projection(self.cross_dim, heads if self.rewrites else width)} if self.tokens else {}
        if self.tokens > 1:
            found["to_k"] = Projection(self.cross_dim, qk)
            query_source = ADAPTER_KINDS[self.kind].query_source
            if query_source != "image":
                found["to_q"] = Projection(width if query_source == "attention" else self.cross_dim, qk)
        if self.rewrites:
            hidden = self.hidden or (4 * self.cross_dim if self.before_unet else self.cross_dim)
            found["hidden"] = Projection(self.cross_dim, hidden, bias=self.before_unet)
            found["to_out"] = Projection(hidden, width, bias=self.before_unet)
            found |= dict.fromkeys(MIXING if self.mixing else (), Projection(self.cross_dim, self.cross_dim))
            if self.pooled:
                hidden = self.hidden or 4 * self.pooled
                both = Projection(self.pooled, hidden, bias=True), Projection(hidden, self.pooled, bias=True)
                found |= dict(zip(POOLED, both, strict=True))
        elif self.before_unet:
            found["to_out"] = Projection(width, self.cross_dim)
        return found

    def as_json(self) -> dict[str, Any]:
        """The sizes as JSON values. A size that earlier versions did not have is there only where it is given."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if (name, value) not in ADDED_SIZES.items()}

    @property
    def by_categories(self) -> bool:
        """Whether the gate is that of `psa_jax.models.gates`."""
        return self.gate == "categories"


MIXING = ("mix_q", "mix_k", "mix_v", "mix_out")
"""Names of the projections of the self-attention of `AdapterConfig.mixing`."""
POOLED = ("pooled_hidden", "pooled_out")
"""Names of the projections of the edit of the pooled text (`AdapterConfig.pooled`)."""
PLAIN = ("to_out", "hidden", *MIXING, *POOLED)
"""Projections of the kinds before the UNet whose names in files have no suffix `_user`."""
ADDED_SIZES = {"hidden": None, "gate": "attention", "mixing": False, "pooled": False}
"""What a configuration or a file of an earlier version, which lacks these keys, means by that.

A configuration says whether the pooled text is edited, a file how wide it is; False is 0.
"""


def prompt_heads(cross_dim: int) -> int:
    """Attention heads of the kinds before the UNet: the largest number up to `PROMPT_HEADS` that divides the width."""
    return next(h for h in range(PROMPT_HEADS, 0, -1) if not cross_dim % h)
