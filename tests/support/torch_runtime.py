"""Drawing with psa_jax.torch in tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from psa_jax.profiles.encoders import get_encoder
from support.torch_models import tensor

PROMPTS = ["a cat", "cat on a cat"]
IDS = ["0000002", "0000005"]
CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
STEPS = {"num_inference_steps": 2}
ENCODER = get_encoder("features")


def open_pipeline(folder, kind=StableDiffusionPipeline):
    pipe = kind.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(count: int = 2) -> torch.Tensor:
    return tensor(2, 4, 8, 8, seed=4)[:count].clone()


def draw(psa, prompts=PROMPTS, rows=slice(None), **options) -> np.ndarray:
    return psa(prompts[rows], latents=latents()[rows], **CALL | options).images


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


# In a process of its own: in that of the tests every function of psa_jax is wrapped to check its annotations.
_COMPILED = """
import sys
import diffusers
import torch
from psa_jax.torch import load_psa

pipe = getattr(diffusers, sys.argv[1]).from_pretrained(sys.argv[2], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
call = dict(num_inference_steps=2, output_type="pt", latents=torch.randn(1, 4, 8, 8))
psa = load_psa(pipe, sys.argv[3])
users = torch.randn(2, psa.adapter.config.user_dim)
expected = [psa("a cat", user=user, **call).images for user in users]
pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
drawn = [psa("a cat", user=users[0], **call).images]
torch._dynamo.config.error_on_recompile = True
drawn.append(psa("a cat", user=users[1], **call).images)
for a, b in zip(drawn, expected):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
"""


def run_compiled(pipeline: str, folder: Path, adapter: Path, then: str) -> str:
    """Draws for two users with a compiled UNet, compares with one that is not, runs `then`; its last printed line."""
    command = [sys.executable, "-W", "ignore", "-c", _COMPILED + then, pipeline, str(folder), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]
