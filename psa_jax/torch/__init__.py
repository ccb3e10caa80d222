"""The torch runtime: adapters trained in JAX in pipelines of diffusers. Imports no JAX.

from psa_jax.torch import load_psa

psa = load_psa(pipe, "psa_adapter.safetensors", table="table.safetensors")
images = psa(["a cat", "a dog"], user=["0000001", "0000002"], scale=1.0).images
"""

from psa_jax.torch.adapter import UserAdapter
from psa_jax.torch.export import AdaptedUNet, export_unet
from psa_jax.torch.files import load_adapter
from psa_jax.torch.noise import initial_latents
from psa_jax.torch.pipeline import PSA, load_psa

__all__ = ["PSA", "AdaptedUNet", "UserAdapter", "export_unet", "initial_latents", "load_adapter", "load_psa"]
