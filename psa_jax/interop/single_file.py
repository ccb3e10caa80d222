"""Single-file checkpoints of SD1.x and SDXL: from the layout of the original latent-diffusion code to diffusers' names.

Tensors are not copied: a renamed tensor is a lazily read view. Such a file holds no configuration and no tokenizer. The
configurations are those of the released models, and every tensor's shape is checked against them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.interop.folder import Described, read_folder
from psa_jax.interop.parts import PIPELINES, SD, SDXL, Config, Parts, read_tokenizer
from psa_jax.interop.weights import Index, Tensor, Tensors, open_tensors
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig

Named = tuple[str, Tensor]

# Pipeline class -> model -> prefix of its tensors in the file.
PREFIXES = {
    SD: {
        "text_encoder": "cond_stage_model.transformer.",
        "vae": "first_stage_model.",
        "unet": "model.diffusion_model.",
    },
    SDXL: {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
        "vae": "first_stage_model.",
        "unet": "model.diffusion_model.",
    },
}
# Unused tensors of the models: the VAE's discriminator, and CLIP's temperature. Tensors of no model (averages and
# constants of the training code, embedding_manager.*, a ControlNet's control_model.*) are ignored, as in diffusers. The
# exceptions are MARKERS and NOT_DONE.
_NOT_USED = re.compile(r"(first_stage_model\.)?loss\.|(.+\.)?logit_scale$")
# Tensors that are no weights; their presence sets the kind of prediction and a terminal SNR of zero. A1111 and Forge
# read both in any file; ComfyUI reads them in SDXL's, and the second only beside the first; diffusers reads neither.
# A folder's JSON files, where given, take precedence, as in diffusers.
MARKERS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
# Tensors of unsupported models. diffusers takes the latents' mean and deviation from the first two; ComfyUI reads all.
NOT_DONE = {
    "edm_mean": "Playground 2.5's scaling of latents",
    "edm_std": "Playground 2.5's scaling of latents",
    "edm_vpred.sigma_max": "EDM's noise levels",
    "edm_vpred.sigma_min": "EDM's noise levels",
}
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

CONFIGS: dict[str, dict[str, Config]] = {
    SD: {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPTextConfig()},
    SDXL: {
        "unet": UNetConfig(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": VAEConfig(sample_size=1024, scaling_factor=0.13025),
        "text_encoder": CLIPTextConfig(),
        "text_encoder_2": CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
        ),
    },
}
# From the released folders, including keys that only samplers of other classes read: without them DDIM would clip.
_SHARED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    SD: {
        "_class_name": "PNDMScheduler",
        **_SHARED,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
    SDXL: {
        "_class_name": "EulerDiscreteScheduler",
        **_SHARED,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}
# SDXL's tokenizers share one vocabulary and pad differently; SD1.x has the first of them.
_PAD = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
}
_OPEN_CLIP = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _replace_start(name: str, table: dict[str, str]) -> str:
    """A name whose first modules are replaced by the table's, if it lists them."""
    return next((new + name[len(old) :] for old, new in table.items() if name.startswith(f"{old}.")), name)


def unet_name(name: str, layers_per_block: int) -> str:
    """diffusers' name of a UNet tensor of the original code, whose block numbers include the resampling layers.

    Args:
      name: without the model's prefix.
      layers_per_block: of the UNet's configuration.
    """
    name = _replace_start(name, _UNET)
    if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name):
        way, number, place, rest = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(number - (way == "input"), layers_per_block + 1)
        side = "down" if way == "input" else "up"
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if place > 0 and rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        name = f"{side}_blocks.{block}.{'attentions' if place else 'resnets'}.{layer}.{rest}"
    if match := re.match(r"(.*resnets\.\d+)\.(.+)", name):
        name = f"{match[1]}.{_replace_start(match[2], _RESNET)}"
    return name


def ldm_layer(flat: str, layers_per_block: int) -> str:
    """diffusers' name of a UNet layer, from its name in the original code with underscores (`input_blocks_1_1_…`).

    Underscores inside a transformer stay: both codes have the same names there.

    Args:
      flat: the name with underscores.
      layers_per_block: of the UNet's configuration.
    """
    if flat in _FLAT_UNET:
        dotted = _FLAT_UNET[flat]
    elif match := re.match(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)|(middle_block)_(\d+)_(.+)", flat):
        *numbers, rest = (part for part in match.groups() if part is not None)
        dotted = ".".join([*numbers, _FLAT_RESNET.get(rest, rest)])
    else:
        return flat
    return unet_name(f"{dotted}.weight", layers_per_block).removesuffix(".weight")


_FLAT_UNET, _FLAT_RESNET = ({old.replace(".", "_"): old for old in table} for table in (_UNET, _RESNET))


def vae_name(name: str, blocks: int) -> str:
    """diffusers' name of a VAE tensor of the original code, which numbers the decoder's resolutions in reverse.

    Args:
      name: without the model's prefix.
      blocks: number of resolutions.
    """
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    rest = _replace_start(rest, _VAE)
    if match := re.match(r"(down|up)\.(\d+)\.(?:block\.(\d+)|(down|up)sample)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else blocks - 1 - int(match[2])
        place = f"resnets.{match[3]}" if match[3] else f"{match[4]}samplers.0"
        rest = f"{match[1]}_blocks.{level}.{place}.{match[5]}"
    return f"{side}.{rest.replace('nin_shortcut', 'conv_shortcut')}"


def _unet(name: str, tensor: Tensor, config: UNetConfig) -> Iterator[Named]:
    yield unet_name(name, config.layers_per_block), tensor


def _vae(name: str, tensor: Tensor, config: VAEConfig) -> Iterator[Named]:
    if ".attn_1." in name and tensor.shape[2:] == (1, 1):  # a linear layer written as a convolution
        tensor = _squeezed(tensor)
    yield vae_name(name, len(config.block_out_channels)), tensor


def _clip(name: str, tensor: Tensor, config: CLIPTextConfig) -> Iterator[Named]:
    yield name, tensor


def _open_clip(name: str, tensor: Tensor, config: CLIPTextConfig) -> Iterator[Named]:
    """OpenCLIP's names: q, k and v are one tensor, and the projection is transposed."""
    if name == "positional_embedding":
        yield "embeddings.position_embedding.weight", tensor
    elif name == "text_projection":
        yield "text_projection.weight", _turned(tensor)
    elif match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name):
        layer, rest = f"encoder.layers.{match[1]}", match[2]
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            third = tensor.shape[0] // 3
            for place, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                part = _rows(tensor, place * third, third)
                yield f"{layer}.self_attn.{projection}.{rest.removeprefix('attn.in_proj_')}", part
        else:
            yield f"{layer}.{_replace_start(rest, _OPEN_CLIP)}", tensor
    else:
        yield _replace_start(name, _OPEN_CLIP), tensor


_TRANSLATE: dict[str, Callable[[str, Tensor, Any], Iterator[Named]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _clip,
    "text_encoder_2": _open_clip,
}


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    def read(index: Index):
        rows = range(start, start + count)[index[0]]
        return tensor.read((slice(rows.start, rows.stop, rows.step), *index[1:]))

    return Tensor((count, *tensor.shape[1:]), read)


def _turned(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[::-1], lambda index: tensor.read(index[::-1]).T)


def _squeezed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[:2], lambda index: tensor.read((*index, slice(None), slice(None)))[:, :, 0, 0])


def translated(part: str, tensors: Tensors, prefix: str, config: Config) -> Tensors:
    """Tensors of one model under diffusers' names.

    Args:
      part: name of the model in `MODELS`.
      tensors: of the whole file.
      prefix: of the model's tensors.
      config: the model's.

    Raises:
      PSAError: two tensors get the same name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.by_name.items():
        if not name.startswith(prefix) or _NOT_USED.match(name):
            continue
        for new, view in _TRANSLATE[part](name.removeprefix(prefix), tensor, config):
            if new in found:
                raise PSAError(f"{tensors.where}: {name} is in the file under another name too; delete one of them")
            found[new] = view
    return Tensors(tensors.where, found)


def open_single_file(path: Path, tokenizer: Path | None, config: Path | None) -> Parts:
    """Opens a single-file checkpoint without reading weights.

    Args:
      path: of the `.safetensors` file.
      tokenizer: a folder with CLIP's vocab.json and merges.txt, or with such a `tokenizer/`.
      config: a diffusers folder whose JSON files and tokenizers replace the known ones.

    Raises:
      PSAError: another file, an unsupported model, or no tokenizer given.
    """
    tensors = open_tensors(path)
    pipeline = _pipeline(tensors)
    prefixes = PREFIXES[pipeline]
    for name, what in NOT_DONE.items():
        if name in tensors.by_name:
            raise PSAError(f"{path}: {name} asks for {what}, which is not supported; give a model without it")
    configs, force_zeros = CONFIGS[pipeline], pipeline == SDXL
    scheduler = _marked(SCHEDULERS[pipeline], tensors)
    if config is not None:
        described = _described(config, path, pipeline)
        configs, scheduler, force_zeros = described.configs, described.scheduler, described.force_zeros
    return Parts(
        where=path,
        pipeline=pipeline,
        configs=configs,
        tensors={part: translated(part, tensors, prefix, configs[part]) for part, prefix in prefixes.items()},
        tokenizers=_tokenizers(path, pipeline, tokenizer, config),
        scheduler=scheduler,
        force_zeros=force_zeros,
    )


def _marked(scheduler: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Scheduler config with the changes that the file's markers make."""
    for marker, settings in MARKERS.items():
        if marker in tensors.by_name:
            scheduler = scheduler | settings
    if scheduler.get("rescale_betas_zero_snr") and scheduler["_class_name"] == "PNDMScheduler":
        scheduler = scheduler | {"_class_name": "DDIMScheduler"}  # PNDM's class does not support such a schedule
    return scheduler


def unet_config(path: Path, config: Path | None) -> UNetConfig:
    """UNet configuration of a single file, or of the folder that replaces it, without reading weights.

    Args:
      path: of the file.
      config: as in `open_single_file`.

    Raises:
      PSAError: as `open_single_file`.
    """
    pipeline = _pipeline(open_tensors(path))
    return (CONFIGS[pipeline] if config is None else _described(config, path, pipeline).configs)["unet"]


def _described(config: Path, path: Path, pipeline: str) -> Described:
    described = read_folder(config)
    if described.pipeline != pipeline:
        raise PSAError(f"{config}: is for {described.pipeline}, but {path} holds a {pipeline}")
    return described


def _pipeline(tensors: Tensors) -> str:
    """Pipeline class of a file, by its text encoder's tensors."""
    for pipeline, part in ((SDXL, "text_encoder_2"), (SD, "text_encoder")):
        if any(name.startswith(PREFIXES[pipeline][part]) for name in tensors.by_name):
            return pipeline
    for prefix, what in (("cond_stage_model.model.", "SD2.x"), ("conditioner.embedders.0.model.", "the SDXL refiner")):
        if any(name.startswith(prefix) for name in tensors.by_name):
            raise PSAError(f"{tensors.where}: a single file of {what} is not supported; give SD2.x as a folder")
    raise PSAError(
        f"{tensors.where}: not a whole checkpoint of SD1.x or SDXL in the LDM layout; give such a file or a folder"
    )


def _tokenizers(path: Path, pipeline: str, folder: Path | None, config: Path | None) -> dict[str, Any]:
    names = PIPELINES[pipeline].values()
    if folder is None and config is not None:
        return {
            name: read_tokenizer(config / name, class_name)
            for name, class_name in read_folder(config).tokenizers.items()
        }
    if folder is None:
        raise PSAError(
            f"{path}: a single file holds no tokenizer; give --tokenizer=DIR, a folder with CLIP's vocab.json and "
            "merges.txt (the tokenizer/ of any SD1.x or SDXL folder)"
        )
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    return {name: read_tokenizer(folder, pad_token=_PAD[name]) for name in names}


def open_vae_file(path: Path, config: VAEConfig) -> Tensors:
    """Tensors of a VAE under diffusers' names, from a file in diffusers' layout or that of the original code.

    Args:
      path: of the file: a VAE alone, or a whole checkpoint.
      config: the VAE's.
    """
    tensors = open_tensors(path)
    if any(".mid_block." in name for name in tensors.by_name):
        return tensors
    prefix = PREFIXES[SD]["vae"]
    if any(name.startswith(prefix) for name in tensors.by_name):
        return translated("vae", tensors, prefix, config)
    parts = {name: tensor for name, tensor in tensors.by_name.items() if name.startswith(_VAE_PARTS)}
    return translated("vae", Tensors(tensors.where, parts), "", config)
