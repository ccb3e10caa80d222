"""Random torch models of diffusers and transformers: the independent side of every parity test."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from flax import nnx
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from psa_jax.interop.weights import abstract_model, load_weights
from psa_jax.models.unet import AddedConditions

torch.set_num_threads(1)
torch.set_grad_enabled(False)

TOLERANCE = 1e-4  # largest absolute difference, float32
# Compiling is most of the time of these tests; the results are float32 either way.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

UNETS = {
    "sd1_shape": {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32, 32),
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    "linear_deep": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 24, 48),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 40,
        "attention_head_dim": (2, 3, 6),
        "use_linear_projection": True,
        "norm_num_groups": 4,
    },
    "uneven": {  # attention placed differently on the way down and up; other channel counts
        "sample_size": 8,
        "in_channels": 9,
        "out_channels": 5,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (24, 16),
        "layers_per_block": 3,
        "cross_attention_dim": 7,
        "attention_head_dim": 1,
        "norm_num_groups": 2,
        "norm_eps": 1e-3,
    },
    "mid_only": {  # one resolution, cross-attention in the middle alone
        "sample_size": 8,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": (4,),
        "norm_num_groups": 16,
    },
    "sd2_shape": {  # heads of one width at every resolution
        "sample_size": 8,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 20,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "norm_num_groups": 4,
    },
    "sdxl_shape": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 56,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 60,  # a pooled text of 24 and six numbers
        "norm_num_groups": 4,
    },
}
# Latent height and width of the parity run: never square; some halve to odd numbers on the way down.
UNET_SIZES = {
    "sd1_shape": (16, 8),
    "linear_deep": (13, 10),
    "uneven": (5, 9),
    "mid_only": (3, 5),
    "sd2_shape": (8, 16),
    "sdxl_shape": (6, 8),
}

VAES = {
    "sd1_shape": {"block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "norm_num_groups": 4},
    "shallow": {"block_out_channels": (16, 8), "layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 3},
    "flat": {
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "in_channels": 1,
        "out_channels": 2,
    },
}
VAE_SIZES = {"sd1_shape": (24, 32), "shallow": (11, 14), "flat": (3, 5)}

CLIPS = {
    "sd1_shape": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gelu": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
        "max_position_embeddings": 11,
    },
    "old_eos": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "eos_token_id": 2,
    },
    "openclip": {  # the second encoder of SDXL
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "hidden_act": "gelu",
        "eos_token_id": 2,
        "projection_dim": 24,
    },
    "one_layer": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
}


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter, so that a forgotten scale or bias shows; outputs stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "embedding.weight" in name:
            noise = 0.5 * noise
        elif parameter.ndim > 1:
            noise = noise / parameter[0].numel() ** 0.5
        else:
            noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(noise)
    return module.eval()


def torch_unet(name: str) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**UNETS[name]), seed=len(name))


def torch_vae(name: str) -> AutoencoderKL:
    blocks = len(VAES[name]["block_out_channels"])
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    return randomise(AutoencoderKL(**VAES[name], **types), seed=len(name))


def torch_clip(name: str, vocab_size: int = 99) -> CLIPTextModel | CLIPTextModelWithProjection:
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    kind = CLIPTextModelWithProjection if "projection_dim" in CLIPS[name] else CLIPTextModel
    config = CLIPTextConfig(**{"vocab_size": vocab_size, "architectures": [kind.__name__]} | ends | CLIPS[name])
    return randomise(kind(config), seed=len(name))


def torch_added(unet: UNet2DConditionModel) -> dict[str, torch.Tensor] | None:
    """`added_cond_kwargs` for two pictures, or None where the UNet takes none."""
    if unet.config.addition_embed_type is None:
        return None
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    time_ids = torch.tensor([[512.0, 768, 0, 16, 1024, 1024], [300, 200, 40, 0, 512, 640]])
    return {"text_embeds": tensor(2, pooled, seed=3), "time_ids": time_ids}


def flax_added(added: dict[str, torch.Tensor] | None) -> AddedConditions | None:
    return added and AddedConditions(*(jnp.asarray(added[key].numpy()) for key in ("text_embeds", "time_ids")))


def to_flax(make, module: torch.nn.Module, folder: Path) -> nnx.Module:
    """The model `make(rngs)` with the parameters of `module`, through a safetensors file."""
    path = folder / f"{type(module).__name__}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return load_weights(
        abstract_model(lambda _, rngs: make(rngs), None), path, lambda name: name.removeprefix("text_model.")
    )


def run(function, *args):
    """`function(*args)`, compiled quickly."""
    return jax.jit(function, compiler_options=FAST_COMPILE)(*args)


def nhwc(images: torch.Tensor) -> jax.Array:
    return jnp.asarray(images.permute(0, 2, 3, 1).numpy())


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(flax_output, torch_output: torch.Tensor) -> float:
    """Largest absolute difference; images of torch are NCHW. Fails where one side is constant or not finite."""
    expected = torch_output.permute(0, 2, 3, 1) if torch_output.ndim == 4 else torch_output
    expected, output = expected.numpy(), np.asarray(flax_output)
    assert output.shape == expected.shape
    assert output.dtype == np.float32
    assert expected.std() > 0.05, "the torch output hardly varies, so the comparison would say little"
    return float(np.abs(output - expected).max())


def small_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with two merges, from the vocab.json and merges.txt it writes."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


SMALLEST_UNET = UNETS["mid_only"] | {"cross_attention_dim": 32, "norm_num_groups": 8}
"""One cross-attention, and one block of every other kind: for what is compiled often."""


def save_torch_pipeline(folder: Path, *, smallest: bool = False) -> StableDiffusionPipeline:
    """A whole random pipeline of matching parts, saved by diffusers.

    Args:
      smallest: with `SMALLEST_UNET` and one layer in the text encoder.
    """
    tokenizer = small_tokenizer(folder / "source_tokenizer")
    unet = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 24),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    pipeline = join_pipeline(
        randomise(UNet2DConditionModel(**SMALLEST_UNET if smallest else unet), seed=1),
        randomise(AutoencoderKL(**vae), seed=2),
        torch_clip("one_layer" if smallest else "sd1_shape", vocab_size=len(tokenizer)),
        tokenizer,
    )
    pipeline.save_pretrained(folder / "model")
    return pipeline


def join_pipeline(unet, vae, text_encoder, tokenizer) -> StableDiffusionPipeline:
    """Parts of SD1.x as a pipeline with its usual schedule and no safety checker."""
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
