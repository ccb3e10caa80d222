"""Single-file checkpoints: what a folder holds, in the layout of the original code.

diffusers' own conversion says whether the file written here is such a checkpoint; loading it must give the folder's
models.
"""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from flax import nnx
from safetensors.torch import save_file
from torch_pipelines import state_dicts

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, load_vae, weights_hash
from psa_jax.interop.parts import SDXL
from psa_jax.interop.single_file import CONFIGS, SCHEDULERS, _tokenizers, open_vae_file
from psa_jax.interop.weights import abstract_model, load_weights, parameter_count
from psa_jax.models.clip import CLIPText
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE

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


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def single(request, tmp_path_factory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A folder, and the same pipeline as a single file."""
    folder, pipeline = request.getfixturevalue(request.param)
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    tensors = checkpoint(pipeline)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return folder, path, tensors


def assert_same(converted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_file_written_here_is_one_that_diffusers_understands(family, request):
    pipeline = request.getfixturevalue(family)[1]
    tensors, parts = checkpoint(pipeline), state_dicts(pipeline)
    assert_same(convert_ldm_unet_checkpoint(dict(tensors), dict(pipeline.unet.config)), parts["unet"])
    assert_same(convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config)), parts["vae"])
    first = convert_ldm_clip_checkpoint(tensors)
    first.pop("text_model.embeddings.position_ids", None)
    assert_same(
        {k.removeprefix("text_model."): t for k, t in first.items()},
        {k.removeprefix("text_model."): t for k, t in parts["text_encoder"].items()},
    )
    if family == "sdxl":
        second = convert_open_clip_checkpoint(pipeline.text_encoder_2, tensors, "conditioner.embedders.1.model.")
        second.pop("logit_scale", None)
        assert_same(
            {k.removeprefix("text_model."): t for k, t in second.items()},
            {k.removeprefix("text_model."): t for k, t in parts["text_encoder_2"].items()},
        )


def test_a_single_file_gives_the_models_of_the_folder(single):
    folder, path, _ = single
    expected = load_stable_diffusion(folder)
    model = load_stable_diffusion(path, config=folder)
    assert model.family == expected.family
    assert model.scheduler_config == expected.scheduler_config
    assert model.force_zeros_for_empty_prompt == expected.force_zeros_for_empty_prompt
    assert model.folder == path
    assert len(weights_hash(model.folder)) == 64
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(model, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.config == theirs.config
            jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    np.testing.assert_array_equal(model.tokenize(["cat"]), expected.tokenize(["cat"]))
    if model.family == "sdxl":
        np.testing.assert_array_equal(model.tokenize_2(["cat"]), expected.tokenize_2(["cat"]))


def test_a_vae_alone_in_the_ldm_layout(sd1, tmp_path):
    folder, pipeline = sd1
    expected = load_vae(folder)
    tensors = under("", ldm_vae(pipeline.vae.state_dict(), 2))
    for prefix in ("", "first_stage_model."):
        save_file(under(prefix, tensors) | {"model_ema.decay": torch.zeros(())}, tmp_path / "vae.safetensors")
        opened = open_vae_file(tmp_path / "vae.safetensors", expected.config)
        vae = load_weights(abstract_model(VAE, expected.config), opened)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(vae), nnx.state(expected))


def test_the_known_configurations_are_of_the_published_sizes():
    """Parameters of SDXL base as its paper and model card count them: UNet 2.57 B, text encoders 123 M and 695 M."""
    known = CONFIGS[SDXL]
    assert parameter_count(abstract_model(UNet, known["unet"])) == 2_567_463_684
    assert parameter_count(abstract_model(CLIPText, known["text_encoder"])) == 123_060_480
    assert parameter_count(abstract_model(CLIPText, known["text_encoder_2"])) == 694_659_840
    assert SCHEDULERS[SDXL]["_class_name"] == "EulerDiscreteScheduler"


def test_sharded_reading_goes_through_the_views(sdxl, tmp_path):
    """Every device reads its rows of a fused and of a transposed tensor."""
    folder, pipeline = sdxl
    save_file({name: tensor.clone() for name, tensor in checkpoint(pipeline).items()}, tmp_path / "a.safetensors")
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def halves(path, shape):
        axes = [None] * (len(shape) - 1) + ["m" if shape[-1] % 2 == 0 else None]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    model = load_stable_diffusion(tmp_path / "a.safetensors", config=folder, sharding=halves, dtype=jnp.float32)
    expected = load_stable_diffusion(folder)
    for name in ("text_encoder_2", "vae"):
        ours, theirs = nnx.state(getattr(model, name)), nnx.state(getattr(expected, name))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def damaged(change):
    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)

    return write


def only(prefix):
    def change(tensors):
        for name in [n for n in tensors if not n.startswith(prefix)]:
            del tensors[name]

    return damaged(change)


UNET_BIAS = "model.diffusion_model.out.2.bias"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (damaged(lambda t: t.pop(UNET_BIAS)), ["missing tensors: conv_out.bias"]),
        (damaged(lambda t: t.update({"stray.weight": torch.zeros(1)})), ["unexpected tensors: stray.weight"]),
        (damaged(lambda t: t.update({UNET_BIAS + "2": torch.zeros(1)})), ["unexpected tensors: conv_out.bias2"]),
        (damaged(lambda t: t.update({UNET_BIAS: torch.zeros(7)})), ["conv_out.bias has shape (7,)"]),
        (only("model.diffusion_model."), ["not a whole checkpoint of SD1.x or SDXL"]),
        (damaged(lambda t: (t.clear(), t.update({"cond_stage_model.model.x": torch.zeros(1)}))), ["SD2.x"]),
        (lambda path, _: path.write_bytes(b"PK\x03\x04 a pickle"), ["not a whole safetensors file"]),
    ],
    ids=["missing", "stray", "extra", "shape", "unet-only", "sd2", "pickle"],
)
def test_bad_files_are_refused_in_one_line(write, words, sd1, tmp_path):
    folder, pipeline = sd1
    path = tmp_path / "model.safetensors"
    write(path, checkpoint(pipeline))
    with pytest.raises(PSAError) as caught:
        load_stable_diffusion(path, config=folder)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in [str(path), *words]), text


def test_what_must_be_given_with_a_single_file(single, sd1, sdxl, tmp_path):
    folder, path, _ = single
    with pytest.raises(PSAError, match="holds no tokenizer; give --tokenizer=DIR, a folder with CLIP's"):
        load_stable_diffusion(path)
    with pytest.raises(PSAError, match="tokenizer files not found"):
        load_stable_diffusion(path, tokenizer=tmp_path)
    with pytest.raises(PSAError, match="is for folders"):
        load_stable_diffusion(path, config=folder, variant="fp16")
    with pytest.raises(PSAError, match="for single files; a folder has its own"):
        load_stable_diffusion(folder, config=folder)
    other = sdxl[0] if folder == sd1[0] else sd1[0]
    with pytest.raises(PSAError, match="is for StableDiffusion"):
        load_stable_diffusion(path, config=other)
    pickle = shutil.copyfile(path, tmp_path / "model.ckpt")
    with pytest.raises(PSAError, match="model.ckpt is a pickle, which can run code"):
        load_stable_diffusion(pickle)


def test_tokenizers_from_one_vocabulary_pad_as_their_family_does(single):
    folder, path, _ = single
    for vocabulary in (folder, folder / "tokenizer"):
        pipeline = "StableDiffusionXLPipeline" if (folder / "tokenizer_2").is_dir() else "StableDiffusionPipeline"
        pads = [t.pad_token for t in _tokenizers(path, pipeline, vocabulary, None).values()]
        assert pads == ["<|endoftext|>", "!"][: len(pads)]
