"""Single-file checkpoints: what a folder holds, in the layout of the original code.

diffusers' own conversion says whether the file written here is such a checkpoint; loading it must give the folder's
models.
"""

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
from support.torch_ldm import checkpoint, ldm_vae, under
from support.torch_pipelines import state_dicts

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, load_vae, weights_hash
from psa_jax.interop.parts import SDXL
from psa_jax.interop.single_file import CONFIGS, SCHEDULERS, _tokenizers, open_vae_file
from psa_jax.interop.weights import abstract_model, load_weights, parameter_count
from psa_jax.models.clip import CLIPText
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE


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
        strays = {"model_ema.decay": torch.zeros(()), "loss.logvar": torch.zeros(()), "global_step": torch.zeros(())}
        save_file(under(prefix, tensors) | strays, tmp_path / "vae.safetensors")
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
        (damaged(lambda t: t.update({"edm_mean": torch.zeros(1, 4, 1, 1)})), ["edm_mean", "which is not supported"]),
        (damaged(lambda t: t.update({"edm_vpred.sigma_max": torch.ones(1)})), ["edm_vpred.sigma_max", "noise levels"]),
        (damaged(lambda t: t.update({UNET_BIAS + "2": torch.zeros(1)})), ["unexpected tensors: conv_out.bias2"]),
        (damaged(lambda t: t.update({UNET_BIAS: torch.zeros(7)})), ["conv_out.bias has shape (7,)"]),
        (only("model.diffusion_model."), ["not a whole checkpoint of SD1.x or SDXL"]),
        (damaged(lambda t: (t.clear(), t.update({"cond_stage_model.model.x": torch.zeros(1)}))), ["SD2.x"]),
        (lambda path, _: path.write_bytes(b"PK\x03\x04 a pickle"), ["not a whole safetensors file"]),
    ],
    ids=["missing", "edm", "edm-vpred", "extra", "shape", "unet-only", "sd2", "pickle"],
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
