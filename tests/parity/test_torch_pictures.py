"""The same pictures in torch: the runtime, stock diffusers and plain torch from the files that JAX wrote."""

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.numpy import save_file
from support.torch_adapters import adapted_unet, as_jax, file_tensors, prompt_states, random_adapter, user_tokens
from support.torch_models import FAST_COMPILE, nhwc, tensor

from psa_jax.diffusion.generate import UNCONDITIONAL, Generator
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.interop.ip_adapter import WEIGHT_NAME, to_ip_adapter
from psa_jax.interop.native import save_adapter, to_file
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig, prompt_heads
from psa_jax.torch import AdaptedUNet, load_adapter, load_psa

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCALES = (0.0, 0.37, 1.0)
USER_DIM = 7
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a cat", "cat on a cat"]
USERS = tensor(2, USER_DIM, seed=6)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """‖a − b‖/‖b‖ of each picture."""
    ours, theirs = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)


@pytest.fixture(scope="module")
def predict():
    """The JAX UNet on given contexts: compiled once for adapters whose contexts have one shape."""
    return jax.jit(lambda unet, *args: unet(*args), compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_unet_output(small_pipeline, tmp_path, predict, kind, tokens):
    """JAX, psa_jax.torch and the formulas in plain torch; three pictures, one at each scale."""
    theirs, model = small_pipeline
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, kind=kind, tokens=tokens))
    save_adapter(adapter, tmp_path / "a.safetensors", {})
    latents, text, users = tensor(3, 4, 8, 8, seed=1), tensor(3, 9, 32, seed=2), tensor(3, USER_DIM, seed=3)
    times, scales = torch.tensor([3.0, 500.0, 990.0]), torch.tensor(SCALES)
    contexts = adapter(model.unet, as_jax(text), as_jax(users), as_jax(scales))
    ours = np.asarray(predict(model.unet, nhwc(latents), as_jax(times), contexts)).transpose(0, 3, 1, 2)

    if kind in ("prompt", "edit"):
        tensors = file_tensors(adapter)
        z = user_tokens(tensors, users, 32)
        states = prompt_states(tensors, text, z, scales[:, None, None], prompt_heads(32))
        formula = theirs.unet(latents, times, states).sample
    else:
        formula = adapted_unet(theirs.unet, adapter, users, scales)(latents, times, text).sample
    before = dict(theirs.unet.attn_processors)
    try:
        runtime = AdaptedUNet(theirs.unet, load_adapter(tmp_path / "a.safetensors")[0])
        drawn = runtime(latents, times, text, users, scales)
    finally:
        theirs.unet.set_attn_processor(before)
    base = theirs.unet(latents, times, text).sample
    error = relative(drawn, ours)
    print(f"\n{kind} T={tokens}: relative error at scales {SCALES}: {', '.join(f'{e:.1e}' for e in error)}")
    assert (error <= 1e-4).all()
    assert (relative(drawn, formula) <= 1e-5).all()
    moved = relative(drawn, base)
    assert moved[0] <= 1e-6
    assert (moved[1:] > 1e-3).all()


def open_pipeline(kind, folder):
    pipe = kind.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def jax_pixels(model, adapter, users, latents, prompts=PROMPTS, *, steps, guidance, scale=1.0, unconditional="off"):
    """Pictures in [0, 1]."""
    generator = Generator(
        model, adapter, steps=steps, guidance=guidance, unconditional=unconditional, batch_size=len(prompts)
    )
    noise = latents.permute(0, 2, 3, 1).numpy()
    seeds = list(range(len(prompts)))
    drawn = generator.pixels(prompts, seeds, users.numpy(), latents=noise, scale=scale)
    return np.clip(drawn * 0.5 + 0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("family", "kind", "tokens", "unconditional"),
    [
        ("sd1", "prompt", 4, "zeros"),
        ("sd1", "rewrite", 4, "off"),
        ("sd2", "edit", 4, "off"),
        ("sd1", "edit-mixing", 4, "zeros"),
        ("sd2", "text", 8, "same"),
        pytest.param("sdxl", "concept", 2, "off", marks=pytest.mark.slow),
    ],
)
def test_pipelines(request, tmp_path, family, kind, tokens, unconditional):
    folder, _ = request.getfixturevalue(family)
    model, pipe = load_stable_diffusion(folder), open_pipeline(PIPELINES[family], folder)
    kind, mixing = kind.removesuffix("-mixing"), kind.endswith("-mixing")
    sizes = {"user_dim": USER_DIM, "kind": kind, "tokens": tokens, "mixing": mixing}
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, **sizes))
    save_adapter(adapter, tmp_path / "a.safetensors", {"family": family})
    latents, scale = tensor(2, 4, 8, 8, seed=4), np.float32([0.37, 1.0])
    ours = jax_pixels(model, adapter, USERS, latents, steps=4, guidance=5.0, scale=scale, unconditional=unconditional)
    call = {"latents": latents.clone(), "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    psa = load_psa(pipe, tmp_path / "a.safetensors")
    drawn = psa(PROMPTS, user=USERS, scale=scale.tolist(), unconditional=unconditional, **call).images
    base = psa(PROMPTS, allow_unprotected=True, **call).images
    assert np.abs(drawn - base).max() > 0.01
    assert np.abs(drawn - ours).max() <= 1e-3


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("sd1", 1),
        *(pytest.param(family, t, marks=pytest.mark.slow) for family, t in (("sd1", 2), ("sd1", 4), ("sdxl", 2))),
    ],
)
def test_stock_diffusers_with_the_ip_adapter(request, tmp_path, family, tokens):
    """No code of psa_jax on that side: load, call, the same pictures. Guidance with zeros as the unconditional user."""
    folder, _ = request.getfixturevalue(family)
    model, pipe = load_stable_diffusion(folder), open_pipeline(PIPELINES[family], folder)
    config = AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, kind="published", tokens=tokens)
    adapter = random_adapter(config)
    tensors = to_ip_adapter(to_file(adapter), config, tmp_path)
    save_file(tensors, tmp_path / WEIGHT_NAME)
    latents, user = tensor(1, 4, 8, 8, seed=4), USERS[:1]
    options = {"steps": 4, "guidance": 5.0, "scale": 0.37, "unconditional": "zeros"}
    ours = jax_pixels(model, adapter, user, latents, PROMPTS[:1], **options)

    def draw(**more):
        call = {"latents": latents.clone(), "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
        return pipe(PROMPTS[:1], **call, **more).images

    base = draw()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=WEIGHT_NAME, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.37)
    both = torch.cat([torch.zeros_like(user), user])[:, None]
    drawn = draw(ip_adapter_image_embeds=[both])
    assert np.abs(drawn - base).max() > 0.01
    assert np.abs(drawn - ours).max() <= 1e-3


TINY_PROMPTS = ["a cat on a beach with a bell", "crossed blades and a house in the snow"]


def tiny_error(tmp_path, kind: str, tokens: int, unconditional: str) -> float:
    """Largest difference of pixels on the embedded model: 20 steps, guidance 7.5."""
    model = load_stable_diffusion("tiny")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=USER_DIM, kind=kind, tokens=tokens)
    adapter = random_adapter(config)
    # Random answers as large as the text's own would leave noise; this still changes every picture.
    scale = 0.37
    save_adapter(adapter, tmp_path / "a.safetensors", {"family": "sd1"})
    latents = tensor(2, 4, model.unet.config.sample_size, model.unet.config.sample_size, seed=5)
    options = {"steps": 20, "guidance": 7.5, "scale": scale, "unconditional": unconditional}
    ours = jax_pixels(model, adapter, USERS, latents, TINY_PROMPTS, **options)
    psa = load_psa(open_pipeline(StableDiffusionPipeline, TINY), tmp_path / "a.safetensors")
    call = {"latents": latents, "num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"}
    drawn = psa(TINY_PROMPTS, user=USERS, scale=scale, unconditional=unconditional, **call).images
    base = psa(TINY_PROMPTS, allow_unprotected=True, **call).images
    assert base.std() > 0.1
    assert np.abs(drawn - base).max() > 0.05
    return float(np.abs(drawn - ours).max())


@pytest.mark.slow
@pytest.mark.parametrize("unconditional", UNCONDITIONAL)
@pytest.mark.parametrize(
    ("kind", "tokens"), [("text", 8), ("published", 1), ("published", 4), ("concept", 4), ("prompt", 4)]
)
def test_the_tiny_model(tmp_path, kind, tokens, unconditional):
    error = tiny_error(tmp_path, kind, tokens, unconditional)
    print(f"\n{kind} T={tokens} {unconditional}: {error:.1e}")
    assert error <= 1e-3
