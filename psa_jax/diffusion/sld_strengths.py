"""The published strengths of Safe Latent Diffusion and its concept: a table that the command line reads without JAX.

Source: P. Schramowski et al., Safe Latent Diffusion, CVPR 2023, arXiv 2211.05105, table 1, and their pipeline.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)
"""The concept as its authors publish it, with their pipeline."""


class Strength(NamedTuple):
    """How strong the guidance is.

    Attributes:
      warmup: δ, calls of the model at the start that it leaves alone.
      scale: s.
      threshold: λ.
      momentum_scale: s_m.
      momentum_decay: β.
    """

    warmup: int
    scale: float
    threshold: float
    momentum_scale: float
    momentum_decay: float


STRENGTHS: Mapping[str, Strength] = MappingProxyType(
    {
        "weak": Strength(15, 20.0, 0.0, 0.0, 0.0),
        "medium": Strength(10, 1000.0, 0.01, 0.3, 0.4),
        "strong": Strength(7, 2000.0, 0.025, 0.5, 0.7),
        "max": Strength(0, 5000.0, 1.0, 0.5, 0.7),
    }
)
"""The four published ones."""
