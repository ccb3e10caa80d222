"""A pipeline of diffusers in the layout of the original latent-diffusion code: the inverse of what is tested."""

import re

import torch

from support.torch_pipelines import state_dicts

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MID = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def ldm_unet(tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """The inverse of what is tested, walked from the other side: the modules of diffusers in order of their use."""
    modules = dict(UNET)
    number = 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(config.layers_per_block):
            modules[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            if kind.startswith("Cross"):
                modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    modules |= {f"mid_block.{name}": f"middle_block.{place}" for name, place in MID.items()}
    number = 0
    for i, kind in enumerate(config.up_block_types):
        for j in range(config.layers_per_block + 1):
            place = 1
            modules[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            if kind.startswith("Cross"):
                modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
                place = 2
            number += 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    written = {}
    for name, tensor in tensors.items():
        module = next(m for m in modules if name.startswith(m + "."))
        rest = name.removeprefix(module + ".")
        if ".resnets." in module:
            inner, _, leaf = rest.rpartition(".")
            rest = f"{RESNET[inner]}.{leaf}"
        written[f"{modules[module]}.{rest}"] = tensor
    return written


def ldm_vae(tensors: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    written = {}
    for name, tensor in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        if "mid_block.attentions.0." in new:
            head, rest = new.split("mid_block.attentions.0.")
            inner, _, leaf = rest.rpartition(".")
            new = f"{head}mid.attn_1.{ATTENTION[inner]}.{leaf}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        written[new] = tensor
    return written


def ldm_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    written = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": tensors.pop("embeddings.token_embedding.weight"),
        "text_projection": tensors.pop("text_projection.weight").T,
        "logit_scale": torch.tensor(4.6),
    }
    for leaf in ("weight", "bias"):
        written[f"ln_final.{leaf}"] = tensors.pop(f"final_layer_norm.{leaf}")
    for name, tensor in tensors.items():
        layer, rest = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()
        inner, _, leaf = rest.rpartition(".")
        if inner in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        if inner == "self_attn.q_proj":
            joined = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            written[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(joined)
        else:
            written[f"transformer.resblocks.{layer}.{OPEN_CLIP[inner]}.{leaf}"] = tensor
    return written


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def checkpoint(pipeline) -> dict[str, torch.Tensor]:
    """A pipeline of diffusers as one dictionary in the LDM layout, with what training left in such files."""
    parts = state_dicts(pipeline)
    tensors = under("model.diffusion_model.", ldm_unet(parts["unet"], pipeline.unet.config))
    tensors |= under("first_stage_model.", ldm_vae(parts["vae"], len(pipeline.vae.config.block_out_channels)))
    clip = under("text_model.", {k.removeprefix("text_model."): t for k, t in parts["text_encoder"].items()})
    if "text_encoder_2" in parts:
        tensors |= under("conditioner.embedders.0.transformer.", clip)
        tensors |= under("conditioner.embedders.1.model.", ldm_open_clip(parts["text_encoder_2"]))
        return tensors | {"denoiser.sigmas": torch.zeros(10)}
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= under("cond_stage_model.transformer.", clip)
    unused = ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "lvlb_weights")
    averages = {"model_ema.diffusion_modeltime_embed0weight": torch.zeros(2), "model_ema.decay": torch.zeros(())}
    return tensors | dict.fromkeys(unused, torch.zeros(10)) | averages
