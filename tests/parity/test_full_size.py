"""Models of full size with random weights give in JAX what they give in torch: prints family × module × error.

One framework at a time and each in a process of its own: torch draws the weights, writes them with its inputs and
outputs, and is gone before JAX reads them. SDXL's UNet alone is 10.3 GB in float32.
"""

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from psa_jax.interop.weights import abstract_model, load_weights, read_json
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import AddedConditions, UNet
from psa_jax.models.vae import VAE

RELATIVE_ERROR = 1e-4  # ‖a − b‖ / ‖b‖, float32

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: a class of diffusers or transformers, what differs from its defaults, and the size of its input."""

    family: str
    module: str
    torch_class: str
    config: Mapping[str, Any]
    size: int  # latents or pixels on a side, or tokens


@dataclasses.dataclass(frozen=True)
class Cost:
    prepare: float  # seconds to draw and write the weights, or to read them
    run: float  # seconds of the calls, compiling included
    peak: float  # GiB that the process held at most

    def __str__(self) -> str:
        return f"{self.prepare:.0f} s + {self.run:.0f} s, {self.peak:.1f} GiB"


VAE_SHAPE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
OPENCLIP = {"hidden_act": "gelu", "eos_token_id": 2}

CASES = {
    "sd15_unet": Case("SD1.5", "UNet", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}, 64),
    "sd21_unet": Case("SD2.1", "UNet", "UNet2DConditionModel", SD2_UNET, 64),
    "sdxl_unet": Case("SDXL", "UNet", "UNet2DConditionModel", SDXL_UNET, 64),
    "sd_vae": Case("SD1, SD2", "VAE", "AutoencoderKL", VAE_SHAPE | {"sample_size": 512}, 512),
    "sdxl_vae": Case("SDXL", "VAE", "AutoencoderKL", VAE_SHAPE | {"sample_size": 1024}, 1024),
    "clip_l": Case("SD1, SDXL", "CLIP-L", "CLIPTextModel", CLIP_L | {"eos_token_id": 2}, 77),
    "openclip_h": Case("SD2.1", "OpenCLIP-H", "CLIPTextModel", CLIP_H | OPENCLIP, 77),
    "openclip_bigg": Case(
        "SDXL", "OpenCLIP-bigG", "CLIPTextModelWithProjection", CLIP_BIGG | OPENCLIP | {"projection_dim": 1280}, 77
    ),
}


def unet_inputs(config: UNetConfig, size: int, random: np.random.Generator) -> Arrays:
    inputs = {
        "latents": random.standard_normal((1, size, size, config.in_channels)),
        "timesteps": np.asarray([601.0]),
        "text": random.standard_normal((1, 77, config.cross_attention_dim)),
    }
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["pooled"] = random.standard_normal((1, pooled))
        inputs["time_ids"] = np.asarray([[1000, 1200, 0, 88, 1024, 1024]])
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def unet_in_torch(model, inputs) -> dict[str, Any]:
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]} if "pooled" in inputs else None
    latents = inputs["latents"].permute(0, 3, 1, 2)
    sample = model(latents, inputs["timesteps"], inputs["text"], added_cond_kwargs=added).sample
    return {"prediction": sample.permute(0, 2, 3, 1)}


def unet_in_jax(model, inputs) -> dict[str, Any]:
    added = AddedConditions(inputs["pooled"], inputs["time_ids"]) if "pooled" in inputs else None
    return {"prediction": model(inputs["latents"], inputs["timesteps"], model.context(inputs["text"]), added)}


def vae_inputs(config: VAEConfig, size: int, random: np.random.Generator) -> Arrays:
    small = size // config.downscale
    images = random.uniform(-1, 1, (1, size, size, config.in_channels))
    latents = random.standard_normal((1, small, small, config.latent_channels))
    return {"images": images.astype(np.float32), "latents": latents.astype(np.float32)}


def vae_in_torch(model, inputs) -> dict[str, Any]:
    import torch

    moments = model.encode(inputs["images"].permute(0, 3, 1, 2)).latent_dist
    pixels = model.decode(inputs["latents"].permute(0, 3, 1, 2)).sample
    encoded = torch.cat([moments.mean, moments.logvar], dim=1)
    return {"encoder": encoded.permute(0, 2, 3, 1), "decoder": pixels.permute(0, 2, 3, 1)}


def text_inputs(config: CLIPTextConfig, size: int, random: np.random.Generator) -> Arrays:
    ids = random.integers(0, config.vocab_size - 1, (2, size), dtype=np.int32)
    ids[0, 9:] = ids[1, -1] = config.vocab_size - 1  # a short prompt and one that is cut
    return {"ids": ids}


def text_in_torch(model, inputs) -> dict[str, Any]:
    output = model(inputs["ids"].long(), output_hidden_states=True)
    last = {"last": output.last_hidden_state, "penultimate": output.hidden_states[-2]}
    return last | ({"projected": output.text_embeds} if "text_embeds" in output else {"pooled": output.pooler_output})


def text_in_jax(model, inputs) -> dict[str, Any]:
    output = model(inputs["ids"])
    last = {"last": output.last, "penultimate": output.hidden[-2]}
    return last | ({"pooled": output.pooled} if output.projected is None else {"projected": output.projected})


@dataclasses.dataclass(frozen=True)
class Kind:
    config_type: type
    model_type: type
    inputs: Callable[..., Arrays]
    in_torch: Callable[..., dict[str, Any]]
    in_jax: tuple[Callable[..., dict[str, Any]], ...]  # compiled and run one after the other


VAE_CALLS = (
    lambda model, inputs: {"encoder": model.encode(inputs["images"])},
    lambda model, inputs: {"decoder": model.decode(inputs["latents"])},
)
TEXT = Kind(CLIPTextConfig, CLIPText, text_inputs, text_in_torch, (text_in_jax,))
KINDS = {
    "UNet2DConditionModel": Kind(UNetConfig, UNet, unet_inputs, unet_in_torch, (unet_in_jax,)),
    "AutoencoderKL": Kind(VAEConfig, VAE, vae_inputs, vae_in_torch, VAE_CALLS),
    "CLIPTextModel": TEXT,
    "CLIPTextModelWithProjection": TEXT,
}


def read_config(case: Case, folder: Path) -> Any:
    return KINDS[case.torch_class].config_type.from_json(read_json(folder / "config.json"))


def peak_memory() -> float:
    """GiB that this process held at most; rusage would count what the parent held when it started it."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**20


def torch_side(case: Case, folder: Path) -> Cost:
    """Draws a model; writes config.json, weights, inputs and outputs."""
    import transformers  # here, so that the process of JAX does without torch

    transformers.logging.set_verbosity_error()
    import diffusers
    import torch
    from support.torch_models import randomise

    torch.set_num_threads(os.cpu_count())
    start = time.perf_counter()
    if KINDS[case.torch_class] is TEXT:
        config = transformers.CLIPTextConfig(architectures=[case.torch_class], **case.config)
        model = getattr(transformers, case.torch_class)(config)
        config.save_pretrained(folder)
    else:
        model = getattr(diffusers, case.torch_class)(**case.config)
        model.save_config(folder)
    randomise(model, seed=0)
    weights = {name.removeprefix("text_model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    inputs = KINDS[case.torch_class].inputs(read_config(case, folder), case.size, np.random.default_rng(0))
    save_file(inputs, folder / "inputs.safetensors")

    called = time.perf_counter()
    outputs = KINDS[case.torch_class].in_torch(model, {name: torch.from_numpy(a) for name, a in inputs.items()})
    save_file({name: t.contiguous().numpy() for name, t in outputs.items()}, folder / "outputs.safetensors")
    return Cost(called - start, time.perf_counter() - called, peak_memory())


def jax_side(case: Case, folder: Path) -> tuple[Cost, dict[str, float]]:
    """The same model and inputs; relative error of each output."""
    kind, start = KINDS[case.torch_class], time.perf_counter()
    model = load_weights(abstract_model(kind.model_type, read_config(case, folder)), folder / "weights.safetensors")
    inputs = {name: jnp.asarray(array) for name, array in load_file(folder / "inputs.safetensors").items()}

    called, outputs = time.perf_counter(), {}
    for call in kind.in_jax:
        outputs |= jax.device_get(jax.jit(call)(model, inputs))
    cost = Cost(called - start, time.perf_counter() - called, peak_memory())
    expected = load_file(folder / "outputs.safetensors")
    assert outputs.keys() == expected.keys()
    return cost, {name: relative_error(outputs[name], expected[name]) for name in expected}


def relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖."""
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype == np.float32
    assert expected.std() > 0.05, "the torch output hardly varies, so the comparison would say little"
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


def alone(function, *args):
    """`function(*args)` in a process of its own, which is gone when this returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compare(case: Case, folder: Path) -> tuple[list[str], float]:
    """Lines for the table, and the largest error."""
    torch_cost = alone(torch_side, case, folder)
    jax_cost, errors = alone(jax_side, case, folder)
    lines = [
        f"{case.family:<10} {f'{case.module} {name}':<26} {error:.1e}   "
        f"torch {torch_cost!s:<26} JAX {jax_cost!s:<26} input {case.size}"
        for name, error in errors.items()
    ]
    return lines, max(errors.values())


@pytest.fixture
def folder(tmp_path):
    """A folder that does not outlive the test: pytest keeps the last ones, and these are of many gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_full_size(name, folder, capsys):
    lines, error = compare(CASES[name], folder)
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert error <= RELATIVE_ERROR
