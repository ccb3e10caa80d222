"""Attention processors with the user's part, and checks that they are used.

In diffusers, other code can replace processors, the UNet or its forward pass, and the pipeline continues silently.
Therefore `Installed` checks before a call, at each step and after it that all processors are in place, that all of them
ran, and that they ran with the text states for which the user's part was computed.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psa_jax.errors import PSAError
from psa_jax.torch.adapter import Context, attend

NOBODY = (
    "no user was given: call psa(prompt, user=...) and not the pipeline itself; "
    "another pipeline with the same UNet needs its own load_psa"
)
AGAIN = "call it before load_psa, or psa.unload() now and load_psa again"
_REPLACED_BY = {
    "SlicedAttnProcessor": "enable_attention_slicing()",
    "XFormersAttnProcessor": "enable_xformers_memory_efficient_attention()",
    "FusedAttnProcessor2_0": "fuse_qkv_projections()",
    "AttnProcessor": "set_attn_processor(), or a switch that was turned off,",
    "AttnProcessor2_0": "set_attn_processor(), or a switch that was turned off,",
    "UserProcessor": "unload_ip_adapter() or AdaptedUNet",
}
_IP_ADAPTER = "load_ip_adapter()", "one pipeline cannot have both: unload_ip_adapter(), psa.unload() and load_psa again"


_TURN = threading.Lock()  # one for all UNets: a lock cannot be copied or pickled


class UserProcessor:
    """Attention processor of diffusers for one cross-attention with a user's part.

    A plain object: an nn.Module would become part of the UNet and of `save_pretrained`. A tensor attribute is an input
    of a compiled graph, so another user needs no new compilation.

    Attributes:
      context: the user's part, for the length of a call.
      text: text states of the last run, [batch, text, C]; written only.
      unprotected: without a context, run as the base model.
    """

    def __init__(self):
        self.context: Context | None = None
        self.text: Tensor | None = None
        self.unprotected = False

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy. A copy made during a call has no user and is not unprotected."""
        return vars(self) | {"context": None, "text": None, "unprotected": False}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """Cross-attention output [batch, pixels, width], as diffusers' AttnProcessor2_0, with the user's part.

        Args:
          attn: diffusers' Attention, whose projections are used.
          hidden_states: pixels [batch, pixels, width].
          encoder_hidden_states: text states [batch, text, C].
          attention_mask: of the text.
          temb, kwargs: ignored, as in diffusers.

        Raises:
          PSAError: no user was given, or another batch size than the users'.
        """
        context = self.context
        if context is None:
            if not self.unprotected:
                raise PSAError(NOBODY)
            context = Context()
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        self.text = text
        batch = hidden_states.shape[0]
        for added in (context.text_value, context.value):
            if added is not None and added.shape[0] != batch:
                raise PSAError(
                    f"the UNet generates {batch} pictures (both sides of guidance counted), users were given for "
                    f"{added.shape[0]}; do not change the batch or the guidance during a call"
                )
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], batch)
            attention_mask = attention_mask.unflatten(0, (batch, -1))
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if context.text_value is not None:
            value = value + context.text_value
        out = attend(query, key, value, attn.heads, attention_mask)
        if context.key is not None:
            user_query = query if context.query is None else F.linear(out, context.query)
            out = out + attend(user_query, context.key, context.value, attn.heads)
        elif context.value is not None:
            out = out + context.value
        return attn.to_out[1](attn.to_out[0](out))


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Cross-attentions of a UNet by processor name, in the order of the adapter's layers."""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {name: unet.get_submodule(name.removesuffix(".processor")) for name in names}


def attach(unet: nn.Module) -> list[UserProcessor]:
    """Gives every cross-attention of a UNet a `UserProcessor`. Self-attentions keep their processors.

    Returns:
      The new processors, in the order of the adapter's layers.
    """
    processors = {name: UserProcessor() for name in cross_attentions(unet)}
    unet.set_attn_processor(unet.attn_processors | processors)
    return list(processors.values())


class Installed:
    """The processors of this package in one UNet, shared by all pipelines with that UNet (`installed`).

    Attributes:
      unet: the UNet.
      in_call: a call is in progress.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self.in_call = False
        self._pipelines: list[weakref.ref] = []
        self._attentions = cross_attentions(unet)
        self._before = {name: attention.processor for name, attention in self._attentions.items()}
        self._processors = dict(zip(self._attentions, attach(unet), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy or a pickle: it belongs to no pipeline yet."""
        return vars(self) | {"_pipelines": [], "in_call": False}

    @property
    def count(self) -> int:
        """Number of cross-attentions."""
        return len(self._processors)

    def start(self) -> None:
        """Marks the start of a call. Only one runs at a time, over all threads.

        Raises:
          PSAError: another call is in progress.
        """
        with _TURN:
            if self.in_call:
                raise PSAError("the pipeline is generating for another user; wait until it is done")
            self.in_call = True

    def check(self) -> None:
        """Checks that all processors are in place.

        Raises:
          PSAError: one was replaced; the message names the method of diffusers that did it.
        """
        now = cross_attentions(self.unet)
        if now.keys() != self._processors.keys():
            raise PSAError(f"the UNet has other cross-attentions than when load_psa was called; {AGAIN}")
        for name, attention in now.items():
            self._check_place(name, attention)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Sets the user's part of each processor, in the order of the adapter's layers."""
        for processor, context in zip(self._processors.values(), contexts, strict=True):
            processor.context, processor.text = context, None

    def leave_unprotected(self) -> None:
        """Lets the processors run as the base model until `end`."""
        for processor in self._processors.values():
            processor.unprotected = True

    def end(self) -> None:
        """Marks the end of a call: the processors have no user any more."""
        self.in_call = False
        for processor in self._processors.values():
            processor.context, processor.text, processor.unprotected = None, None, False

    def were_run(self) -> bool:
        """Whether a processor ran since the last `check_run`."""
        return any(processor.text is not None for processor in self._processors.values())

    def check_run(self, text: Tensor) -> None:
        """Checks that every processor ran since the last check, with the given text states [batch, text, C].

        Raises:
          PSAError: one did not, so the pictures are not for the user.
        """
        known = None
        for name, processor in self._processors.items():
            self._check_place(name, self._attentions[name])
            seen, processor.text = processor.text, None
            if seen is None:
                raise PSAError(
                    f"{name} was not run in a step, so the user was left out: something replaced or skips a part of "
                    f"the UNet (a cache, another forward()); {AGAIN}, or do without it"
                )
            if seen is known:
                continue
            if seen.shape != text.shape or not torch.equal(seen, text.to(seen)):
                raise PSAError(
                    "the UNet was given other text states than those that the user's part was made for; do not change "
                    "prompt_embeds or the guidance during a call"
                )
            known = seen

    def add_pipeline(self, psa: Any) -> None:
        """Registers a `PSA` by weak reference; a second call does nothing."""
        if all(known() is not psa for known in self._pipelines):
            self._pipelines.append(weakref.ref(psa))

    def remove_pipeline(self, psa: Any) -> None:
        """Removes a `PSA`. After the last one, the UNet's own processors are put back where ours are."""
        self._pipelines = [known for known in self._pipelines if known() not in (None, psa)]
        if any(known().uses_unet(self.unet) for known in self._pipelines):
            return
        now = self.unet.attn_processors
        ours = {name: self._before[name] for name, one in now.items() if isinstance(one, UserProcessor)}
        self.unet.set_attn_processor(now | ours)
        del self.unet.psa

    def _check_place(self, name: str, attention: nn.Module) -> None:
        if attention.processor is self._processors[name]:
            return
        other = type(attention.processor).__name__
        switch, advice = _REPLACED_BY.get(other, f"a processor {other}"), AGAIN
        if other.startswith("IPAdapter"):
            switch, advice = _IP_ADAPTER
        raise PSAError(f"{switch} took the user's adapter out of the UNet ({name} is {other}); {advice}")


def installed(unet: nn.Module) -> Installed:
    """The `Installed` of a UNet; installs new processors if it has none."""
    if getattr(unet, "psa", None) is None:
        unet.psa = Installed(unet)
    return unet.psa
