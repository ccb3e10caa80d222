"""The torch way of one training step, for `psa-jax bench step`: what the original does, written on diffusers.

Two UNets, the policy's with user attention in every cross-attention (kind `published`: K, V and an attention in each
layer), and pictures and prompts encoded in every step. It runs on a GPU where torch sees one; with bfloat16,
frozen weights are in it and the rest is left to autocast. Needs the `torch` extra.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention


class UserAttention(torch.nn.Module):
    """One layer's to_k_user and to_v_user; the user tokens `z` are set before each pass."""

    def __init__(self, cross: int, width: int):
        super().__init__()
        self.to_k_user = torch.nn.Linear(cross, width, bias=False)
        self.to_v_user = torch.nn.Linear(cross, width, bias=False)
        torch.nn.init.zeros_(self.to_v_user.weight)
        self.z: torch.Tensor | None = None

    def forward(
        self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> torch.Tensor:
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(query, key, value):
            return F.scaled_dot_product_attention(query, heads(key), heads(value)).transpose(1, 2).flatten(2)

        query = heads(attn.to_q(hidden_states))
        out = attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        out = out + attend(query, self.to_k_user(self.z), self.to_v_user(self.z))
        return attn.to_out[0](out)


class Adapter(torch.nn.Module):
    """User embedding to tokens, and the attention of every layer, put into a UNet."""

    def __init__(self, unet: UNet2DConditionModel, user_dim: int, tokens: int):
        super().__init__()
        cross = unet.config.cross_attention_dim
        self.proj, self.norm = torch.nn.Linear(user_dim, tokens * cross), torch.nn.LayerNorm(cross)
        processors = dict(unet.attn_processors)
        names = [name for name in processors if name.endswith("attn2.processor")]
        widths = [unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names]
        self.layers = torch.nn.ModuleList(UserAttention(cross, width) for width in widths)
        unet.set_attn_processor(processors | dict(zip(names, self.layers, strict=True)))

    def forward(self, user: torch.Tensor) -> None:
        """Tells every layer whom the next pass is for."""
        z = self.norm(self.proj(user).unflatten(-1, (-1, self.norm.normalized_shape[0])))
        for layer in self.layers:
            layer.z = z


def make_step(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: str,
    pairs: int,
    resolution: int,
    user_dim: int,
    tokens: int,
    beta: float,
    sft_weight: float,
) -> Callable[[], float]:
    """A training step on random pictures, prompts and users, which returns its loss."""
    device, number = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant=variant, safety_checker=None).to(device, number)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    reference = copy.deepcopy(pipe.unet)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    adapter = Adapter(pipe.unet, user_dim, tokens).to(device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=1e-2)
    torch.manual_seed(0)
    length = pipe.tokenizer.model_max_length

    @torch.autocast(device.type, number, enabled=number != torch.float32)
    def loss_of_batch() -> torch.Tensor:
        pixels = torch.rand(2 * pairs, 3, resolution, resolution, dtype=number, device=device) * 2 - 1
        ids = torch.randint(0, pipe.text_encoder.config.vocab_size, (pairs, length), device=device)
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            text = pipe.text_encoder(ids).last_hidden_state.repeat(2, 1, 1)
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (pairs,), device=device).repeat(2)
        noisy = scheduler.add_noise(latents, noise, times)
        target = (
            noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, times)
        )
        adapter(torch.randn(pairs, user_dim, device=device).repeat(2, 1))

        def errors(unet):
            found = unet(noisy, times, text).sample
            return F.mse_loss(found.float(), target.float(), reduction="none").mean((1, 2, 3)).chunk(2)

        with torch.no_grad():
            rw, rl = errors(reference)
        pw, pl = errors(pipe.unet)
        z = 0.5 * beta * ((pl - rl) - (pw - rw))
        return (-F.logsigmoid(z) + sft_weight * (pw - rw)).mean()

    def step() -> float:
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
