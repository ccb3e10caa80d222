"""The design's adapter kinds in plain torch, written from the formulas and fed from the native file's tensors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from flax import nnx

from psa_jax.interop.native import adapter_shapes, to_file, with_arrays
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig

Tensors = dict[str, torch.Tensor]


def random_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    """Every parameter drawn, none zero; answers of order one."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in sorted(adapter_shapes(config).items()):
        noise = random.standard_normal(shape.shape)
        if len(shape.shape) == 2:
            noise *= shape.shape[0] ** -0.5
        else:
            noise = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        arrays[name] = jnp.asarray(noise, jnp.float32)
    return with_arrays(config, arrays)


def untrained_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    return Adapter(config, rngs=nnx.Rngs(seed))


def file_tensors(adapter: Adapter) -> Tensors:
    """What the native file holds, as torch reads it."""
    return {name: torch.from_numpy(array.copy()) for name, array in to_file(adapter).items()}


def user_tokens(tensors: Tensors, user: torch.Tensor, cross_dim: int) -> torch.Tensor:
    """z = LayerNorm(reshape(W_p u + b_p, [T, C]))."""
    tokens = F.linear(user, tensors["user_proj.proj.weight"], tensors["user_proj.proj.bias"])
    tokens = tokens.reshape(len(user), -1, cross_dim)
    return F.layer_norm(tokens, (cross_dim,), tensors["user_proj.norm.weight"], tensors["user_proj.norm.bias"], 1e-5)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q kᵀ/√d) v, one head after the other."""
    answers = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        answers.append(weights @ v)
    return torch.cat(answers, dim=-1)


def rewritten(text: torch.Tensor, w: Tensors, z: torch.Tensor, heads: int) -> torch.Tensor:
    """Of each head g·(W_o gelu(W_1 e + b_1) + b_o), with g = softmax(q kᵀ/√d)·(W_v z)."""
    states = F.linear(F.gelu(F.linear(text, w["hidden"], w.get("hidden_bias"))), w["to_out"], w.get("to_out_bias"))
    gates = F.linear(z, w["to_v"])  # [batch, T, heads]
    if "to_q" in w:
        query, key = F.linear(text, w["to_q"]), F.linear(z, w["to_k"])
        each = zip(query.chunk(heads, -1), key.chunk(heads, -1), gates.chunk(heads, -1), strict=True)
        gates = torch.cat([attention(q, k, v, 1) for q, k, v in each], dim=-1)
    parts = [gates[..., [head]] * part for head, part in enumerate(states.chunk(heads, -1))]
    return torch.cat(parts, dim=-1)


class UserProcessor:
    """One cross-attention with the user tokens; s is a column [batch, 1, 1]."""

    def __init__(self, kind: str, weights: Tensors, z: torch.Tensor, scale: torch.Tensor):
        self.kind, self.weights, self.z, self.scale = kind, weights, z, scale

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        assert encoder_hidden_states is not None
        assert attention_mask is None
        text, w, s, z, heads = encoder_hidden_states, self.weights, self.scale, self.z, attn.heads
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if self.kind == "rewrite":
            return attn.to_out[0](attention(query, key, value + s * rewritten(text, w, z, heads), heads))
        user_value = F.linear(z, w["to_v"])
        user_key = F.linear(z, w["to_k"]) if "to_k" in w else torch.zeros_like(user_value)

        def ask(states):
            asked = F.linear(states, w["to_q"]) if "to_q" in w else torch.zeros(*states.shape[:2], user_key.shape[-1])
            return attention(asked, user_key, user_value, heads)

        if self.kind == "text":
            out = attention(query, key, value + s * ask(text), heads)
        else:
            out = attention(query, key, value, heads)
            if self.kind == "published":
                out = out + s * attention(query, user_key, user_value, heads)
            elif self.kind == "concept":
                out = out + s * ask(out)
            else:
                raise AssertionError(self.kind)
        return attn.to_out[0](out)


def cross_attention_names(unet: UNet2DConditionModel) -> list[str]:
    """Names of the cross-attentions in the order of `attn_processors`."""
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


def layer_weights(tensors: Tensors, index: int) -> Tensors:
    """{"to_v": …} of one layer, whatever there is."""
    start = f"psa_adapter.{index}."
    return {name.removeprefix(start).split("_user")[0]: t for name, t in tensors.items() if name.startswith(start)}


def prompt_states(
    tensors: Tensors, text: torch.Tensor, z: torch.Tensor, scale: torch.Tensor, heads: int
) -> torch.Tensor:
    """e + s·W_o attn(W_q e, W_k z, W_v z), or with a hidden layer what `rewritten` adds."""
    if "prompt_adapter.hidden.weight" in tensors:
        named = {n.removeprefix("prompt_adapter.").replace("_user", ""): t for n, t in tensors.items()}
        w = {n.removesuffix(".weight").replace(".bias", "_bias"): t for n, t in named.items()}
        return text + scale * rewritten(text, w, z, heads)
    value = F.linear(z, tensors["prompt_adapter.to_v_user.weight"])
    if "prompt_adapter.to_k_user.weight" in tensors:
        query = F.linear(text, tensors["prompt_adapter.to_q_user.weight"])
        value = attention(query, F.linear(z, tensors["prompt_adapter.to_k_user.weight"]), value, heads)
    return text + scale * F.linear(value, tensors["prompt_adapter.to_out.weight"])


def gates_of_prompts(tensors: Tensors, text: torch.Tensor, user: torch.Tensor, heads: int) -> torch.Tensor:
    """The gate of a pooled text: by categories [batch, 1], or each head's largest over the tokens [batch, heads]."""
    if "user_gate.0.weight" in tensors:

        def half(name, x):
            hidden = F.gelu(F.linear(x, tensors[f"{name}.0.weight"], tensors[f"{name}.0.bias"]))
            return F.linear(hidden, tensors[f"{name}.2.weight"], tensors[f"{name}.2.bias"])

        asked = torch.sigmoid(torch.log(torch.exp(half("prompt_gate", text)).sum(1)))
        return 1 - (1 - asked * torch.sigmoid(half("user_gate", user))).prod(1, keepdim=True)
    z = user_tokens(tensors, user, text.shape[-1])
    w = {name: tensors.get(f"prompt_adapter.to_{name}_user.weight") for name in "qkv"}
    found = []
    for head, value in enumerate((z @ w["v"].T).unbind(-1)):  # [batch, T], a number for each user token
        if w["q"] is None:
            found.append(value[:, 0])
            continue
        query, key = ((x @ each.T).chunk(heads, -1)[head] for x, each in ((text, w["q"]), (z, w["k"])))
        weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
        found.append((weights @ value[..., None])[..., 0].max(dim=1).values)
    return torch.stack(found, dim=1)


def edited_pooled(tensors: Tensors, pooled: torch.Tensor, gates: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q + s·g·(W_p2 gelu(W_p1 n + b_p1) + b_p2), with each head's g on its part; n is q of mean 0 and variance 1."""
    w = {name.removeprefix("prompt_adapter.pooled_"): t for name, t in tensors.items() if ".pooled_" in name}
    centred = pooled - pooled.mean(1, keepdim=True)
    normal = centred / ((centred**2).mean(1, keepdim=True) + 1e-5).sqrt()
    made = F.gelu(normal @ w["hidden.weight"].T + w["hidden.bias"]) @ w["out.weight"].T + w["out.bias"]
    parts = [gates[:, [head]] * part for head, part in enumerate(made.chunk(gates.shape[1], dim=1))]
    return pooled + scale[:, None] * torch.cat(parts, dim=1)


def adapted_unet(
    unet: UNet2DConditionModel, adapter: Adapter, user: torch.Tensor, scale: torch.Tensor
) -> UNet2DConditionModel:
    """A copy of the torch UNet whose cross-attentions hear the users, one a row of the batch."""
    tensors = file_tensors(adapter)
    z = user_tokens(tensors, user, adapter.config.cross_dim)
    unet = copy.deepcopy(unet)
    processors = dict(unet.attn_processors)
    for index, name in enumerate(cross_attention_names(unet)):
        weights = layer_weights(tensors, index)
        processors[name] = UserProcessor(adapter.config.kind, weights, z, scale[:, None, None])
    unet.set_attn_processor(processors)
    return unet


def as_jax(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.numpy())
