"""Three pairs, and what torch predicts for them: winners and losers, by policy and reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDPMScheduler

from psa_jax.models.config import VAEConfig
from psa_jax.models.vae import latent_noise
from psa_jax.preference.draws import spread_timesteps
from support.torch_adapters import adapted_unet

PAIRS, USER_DIM, FACTOR = 3, 6, 0.18215
VAE = VAEConfig(scaling_factor=FACTOR)
KEY = jax.random.key(3)
# An unsafe prompt that its user bans, one that its user allows, a safe one.
PROMPTS = {"banned": jnp.asarray([True, False, True]), "unsafe": jnp.asarray([True, True, False])}


class TorchPairs(NamedTuple):
    """What torch predicts for the noise and timesteps that `KEY` draws: winners, losers, by policy and reference."""

    policy: tuple[torch.Tensor, torch.Tensor]
    reference: tuple[torch.Tensor, torch.Tensor]
    noise: torch.Tensor
    timesteps: torch.Tensor

    def errors(self) -> tuple[torch.Tensor, ...]:
        """(pw, pl, rw, rl)."""
        return tuple(((x - self.noise) ** 2).mean(dim=(1, 2, 3)).double() for x in (*self.policy, *self.reference))


def torch_pairs(theirs, schedule, batch, adapter, factor: float, user=None, **conditions) -> TorchPairs:
    """`user` is the batch's, unless a tensor whose gradient is wanted; `conditions` are for the UNet."""
    *_, vae_noise_w, vae_noise_l, noise_key, time_key = jax.random.split(KEY, 6)

    def to_torch(x):
        return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)

    timesteps = torch.from_numpy(np.array(spread_timesteps(time_key, PAIRS, 0.0, float(schedule.steps))))
    noise = to_torch(latent_noise(noise_key, batch["chosen"]))
    forward = DDPMScheduler.from_config(theirs.scheduler.config)
    user = torch.from_numpy(np.array(batch["user"])) if user is None else user
    policy = adapted_unet(theirs.unet, adapter, user, torch.ones(PAIRS))

    def predict(unet, side, key):
        mean, log_variance = to_torch(batch[side]).chunk(2, dim=1)
        clean = factor * (mean + (log_variance / 2).exp() * to_torch(latent_noise(key, batch[side])))
        return unet(forward.add_noise(clean, noise, timesteps), timesteps, **conditions).sample

    sides = (("chosen", vae_noise_w), ("rejected", vae_noise_l))
    both = (tuple(predict(unet, side, key) for side, key in sides) for unet in (policy, theirs.unet))
    return TorchPairs(*both, noise, timesteps)


def text_states(theirs, batch, name: str = "input_ids") -> torch.Tensor:
    """Text states of a column of token ids."""
    return theirs.text_encoder(torch.from_numpy(np.array(batch[name]))).last_hidden_state
