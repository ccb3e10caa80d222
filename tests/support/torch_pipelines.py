"""Small random pipelines of SD2.x and SDXL, saved by diffusers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from psa_jax.diffusion.samplers import step_noise
from support.torch_models import randomise, small_tokenizer, torch_clip

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "norm_num_groups": 4,
}
OPENCLIP = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "bos_token_id": 0,  # bos and eos as in the published files, where they mean nothing
    "eos_token_id": 2,
}


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """One vocabulary padded with the end of text, and with "!", which is id 0 as in CLIP's own vocabulary."""
    first = small_tokenizer(folder)
    return first, CLIPTokenizer.from_pretrained(folder, local_files_only=True, pad_token="!")


def save_sdxl(folder: Path) -> StableDiffusionXLPipeline:
    first, second = tokenizers(folder / "source_tokenizer")
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 24 + 6 * 6,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 32 + 24,
    }
    pipeline = StableDiffusionXLPipeline(
        unet=randomise(UNet2DConditionModel(**UNET | added), seed=1),
        vae=randomise(AutoencoderKL(**VAE, scaling_factor=0.13025), seed=2),
        text_encoder=torch_clip("sd1_shape", vocab_size=len(first)),
        text_encoder_2=torch_clip("openclip", vocab_size=len(first)),
        tokenizer=first,
        tokenizer_2=second,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    return pipeline


def save_sd2(folder: Path) -> StableDiffusionPipeline:
    _, tokenizer = tokenizers(folder / "source_tokenizer")
    pipeline = StableDiffusionPipeline(
        unet=randomise(UNet2DConditionModel(**UNET, cross_attention_dim=24), seed=1),
        vae=randomise(AutoencoderKL(**VAE), seed=2),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**OPENCLIP, vocab_size=len(tokenizer))), seed=3),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return pipeline


def state_dicts(pipeline) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of every model of a pipeline of diffusers."""
    return {
        name: module.state_dict() for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)
    }


def torch_noise(seeds: list[int]):
    """diffusers' `randn_tensor`, giving call by call the noise that the generator here draws for these seeds."""
    keys, calls = jnp.stack([jax.random.key(seed) for seed in seeds]), iter(range(1000))

    def draw(shape, **_):
        noise = step_noise(keys, jnp.int32(next(calls)), (shape[2], shape[3], shape[1]))
        return torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)

    return draw
