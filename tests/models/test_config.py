"""Configurations: real ones of released models are read, what is not implemented is refused by name."""

import dataclasses
import inspect
import json

import jax
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from flax import nnx
from support.released_configs import (
    DOWN,
    SD14_UNET_FLAX,
    SD14_VAE,
    SD15_TEXT,
    SD15_UNET,
    SD15_UNET_FINE_TUNED,
    SD21_768_UNET,
    SD21_TEXT,
    SD21_UNET,
    SD_TURBO_UNET,
    SDXL_TEXT_2,
    SDXL_TURBO_UNET,
    SDXL_UNET,
    SDXL_VAE,
    UP,
)
from support.torch_models import CLIPS, UNETS, VAES, torch_clip, torch_unet, torch_vae
from transformers import CLIPTextConfig as TorchConfig
from transformers import CLIPTextModel

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import config_json
from psa_jax.interop.weights import abstract_model, parameter_count
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE


def test_released_configs_are_the_default_sizes():
    for config in (SD15_UNET, SD14_UNET_FLAX, SD15_UNET_FINE_TUNED):
        assert UNetConfig.from_json(config) == UNetConfig()
    vae = VAEConfig.from_json(SD14_VAE)
    assert vae == VAEConfig()
    assert (vae.scaling_factor, vae.downscale) == (0.18215, 8)
    text = CLIPTextConfig.from_json(SD15_TEXT)
    assert (text.hidden_size, text.num_attention_heads, text.eos_token_id) == (768, 12, 2)


@pytest.mark.parametrize("config", [SD21_UNET, SD21_768_UNET, SD_TURBO_UNET])
def test_sd2_configs_are_read(config):
    unet = UNetConfig.from_json(config)
    assert unet.use_linear_projection
    assert unet.heads == (5, 10, 20, 20)
    assert unet.cross_attention_dim == CLIPTextConfig.from_json(SD21_TEXT).hidden_size == 1024
    assert {width // heads for width, heads in unet.cross_attentions} == {64}
    assert unet.addition_embed_type is None


@pytest.mark.parametrize("config", [SDXL_UNET, SDXL_TURBO_UNET])
def test_sdxl_configs_are_read(config):
    unet = UNetConfig.from_json(config)
    text, text_2 = CLIPTextConfig.from_json(SD15_TEXT), CLIPTextConfig.from_json(SDXL_TEXT_2)
    assert unet.depths == (1, 2, 10)
    assert {width // heads for width, heads in unet.cross_attentions} == {64}
    assert unet.cross_attention_dim == text.hidden_size + text_2.hidden_size
    assert text.projection_dim is None
    pooled_and_ids = text_2.projection_dim + 6 * unet.addition_time_embed_dim
    assert pooled_and_ids == unet.projection_class_embeddings_input_dim
    assert VAEConfig.from_json(SDXL_VAE) == VAEConfig(sample_size=1024, scaling_factor=0.13025)


# Published sizes.
@pytest.mark.parametrize(
    ("model_type", "config", "count"),
    [
        (UNet, UNetConfig.from_json(SD15_UNET), 859_520_964),
        (VAE, VAEConfig.from_json(SD14_VAE), 83_653_863),
        (CLIPText, CLIPTextConfig.from_json(SD15_TEXT), 123_060_480),
        (UNet, UNetConfig.from_json(SD21_UNET), 865_910_724),
        (CLIPText, CLIPTextConfig.from_json(SD21_TEXT), 340_387_840),
        (UNet, UNetConfig.from_json(SDXL_UNET), 2_567_463_684),
        (CLIPText, CLIPTextConfig.from_json(SDXL_TEXT_2), 694_659_840),
    ],
    ids=["sd15_unet", "vae", "sd15_text", "sd21_unet", "sd21_text", "sdxl_unet", "sdxl_text_2"],
)
def test_parameter_counts(model_type, config, count):
    model = abstract_model(model_type, config)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    assert parameter_count(model) == count


def test_what_diffusers_and_transformers_write_is_read(tmp_path):
    for kind, make, names in (
        (UNetConfig, torch_unet, UNETS),
        (VAEConfig, torch_vae, VAES),
        (CLIPTextConfig, torch_clip, CLIPS),
    ):
        for name, sizes in names.items():
            make(name).config.save_pretrained(tmp_path) if kind is CLIPTextConfig else make(name).save_config(tmp_path)
            config = kind.from_json(json.loads((tmp_path / "config.json").read_text()))
            assert {key: getattr(config, key) for key in sizes} == sizes


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        (UNetConfig(**UNETS["uneven"]), "UNet2DConditionModel"),
        (UNetConfig(**UNETS["linear_deep"]), "UNet2DConditionModel"),
        (VAEConfig(**VAES["shallow"]), "AutoencoderKL"),
        (UNetConfig(**UNETS["sdxl_shape"]), "UNet2DConditionModel"),
        (CLIPTextConfig(**CLIPS["gelu"]), "CLIPTextModel"),
        (CLIPTextConfig(**CLIPS["openclip"]), "CLIPTextModelWithProjection"),
    ],
)
def test_config_json_round_trip(config, class_name):
    if isinstance(config, CLIPTextConfig):
        assert config.architecture == class_name
    written = json.loads(json.dumps(config_json(class_name, config)))
    assert type(config).from_json(written) == config


def test_absent_keys_mean_what_the_original_libraries_take():
    def defaults(constructor):
        return {name: parameter.default for name, parameter in inspect.signature(constructor).parameters.items()}

    for config, theirs in (
        (CLIPTextConfig.from_json({"architectures": ["CLIPTextModelWithProjection"]}), vars(TorchConfig())),
        (UNetConfig.from_json({}), defaults(UNet2DConditionModel.__init__)),
        (VAEConfig.from_json({"block_out_channels": [64]}), defaults(AutoencoderKL.__init__)),
    ):
        ours = dataclasses.asdict(config)
        assert ours == {key: theirs[key] for key in ours}


def parameters(constructor) -> set[str]:
    """What the original reads from a configuration."""
    return set(inspect.signature(constructor).parameters) - {"self", "kwargs"}


def test_every_key_that_the_original_reads_is_known():
    """A key in no table counts as not read by the original: so none of those it reads may be missing."""
    for kind, constructor, harmless in (
        (UNetConfig, UNet2DConditionModel.__init__, {"upcast_attention", "addition_embed_type_num_heads", "dropout"}),
        (VAEConfig, AutoencoderKL.__init__, {"force_upcast", "down_block_types", "up_block_types"}),
    ):
        fields = {field.name for field in dataclasses.fields(kind)}
        assert parameters(constructor) - fields - set(kind._fixed) == harmless
        assert fields - {"norm_eps"} <= parameters(constructor)


def same_output(first: torch.nn.Module, second: torch.nn.Module, *inputs) -> bool:
    """Of two modules of the original, the second with the weights of the first."""
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        return torch.equal(first.eval()(*inputs)[0], second.eval()(*inputs)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"motion_module_type": "vanilla", "use_motion_module": False},
        {"layers_per_block": [1, 1]},
        {"cross_attention_dim": [20, 20]},
        {"only_cross_attention": [False, False]},
        {"upcast_attention": True, "dual_cross_attention": None, "use_linear_projection": None},
        {"class_embeddings_concat": None, "resnet_skip_time_act": None, "center_input_sample": None},
        {"dropout": 0.3},
        {"_class_name": "Another", "trained_by": {"name": "somebody"}, "prediction_type": "epsilon"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_unet_that_diffusers_opens_the_same(change):
    base = {**UNETS["uneven"], "in_channels": 4, "layers_per_block": 1, "cross_attention_dim": 20}
    written = json.loads(json.dumps(base))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 20)
    theirs = UNet2DConditionModel.from_config(written | change)
    assert same_output(UNet2DConditionModel.from_config(written), theirs, *inputs)
    assert UNetConfig.from_json(written | change) == UNetConfig.from_json(written)


@pytest.mark.parametrize("change", [{"num_vq_embeddings": 256}, {"shift_factor": 0.0}, {"force_upcast": False}])
def test_a_vae_that_diffusers_opens_the_same(change):
    written = dict(torch_vae("shallow").config)
    written = json.loads(json.dumps(written))
    theirs = AutoencoderKL.from_config(written | change)
    assert same_output(AutoencoderKL.from_config(written), theirs, torch.randn(1, 3, 16, 16))
    assert VAEConfig.from_json(written | change) == VAEConfig.from_json(written)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e4, "unknown": [1, {"a": 2}]},
        {"attention_dropout": 0.1, "dropout": 0.1},
        {"pad_token_id": -1, "bos_token_id": None},
        {"architectures": None, "use_cache": False, "dtype": "float16"},
        {"model_type": "clip"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_text_encoder_that_transformers_opens_the_same(change, tmp_path):
    theirs = torch_clip("gelu")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before = CLIPTextConfig.from_json(json.loads(path.read_text()))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ids = torch.arange(1, 8)[None]
    again = CLIPTextModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids)[0], again.eval()(ids)[0])
    ours = dataclasses.asdict(CLIPTextConfig.from_json(json.loads(path.read_text())))
    assert ours == dataclasses.asdict(before) | {key: value for key, value in change.items() if key in ours}


def test_a_resolution_without_attention_has_any_depth():
    from diffusers import UNet2DConditionModel

    released = UNetConfig.from_json(SDXL_UNET)
    assert UNetConfig.from_json(SDXL_UNET | {"transformer_layers_per_block": [0, 2, 10]}) == released
    for depths in ([1, 0, 10], [1, 2, 0], [-1, 2, 10], [False, 2, 10]):
        with pytest.raises(PSAError, match="transformer_layers_per_block"):
            UNetConfig.from_json(SDXL_UNET | {"transformer_layers_per_block": depths})
    # As diffusers has it.
    small = {"block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2], "norm_num_groups": 4}
    names = [
        UNet2DConditionModel.from_config(
            SDXL_UNET | small | {"transformer_layers_per_block": depths}
        ).state_dict().keys()
        for depths in ([0, 1, 2], [1, 1, 2])
    ]  # fmt: skip
    assert names[0] == names[1]


def test_the_text_half_of_a_whole_clip():
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 9}
    whole |= {"text_config": {k: v for k, v in SD15_TEXT.items() if k != "architectures"}, "vision_config": {}}
    for architecture in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        found = CLIPTextConfig.from_json(whole | {"architectures": [architecture]})
        assert found == CLIPTextConfig.from_json(SD15_TEXT | {"architectures": [architecture]})


@pytest.mark.parametrize(
    ("kind", "base", "change"),
    [
        (UNetConfig, SD15_UNET, {"class_embed_type": "timestep"}),
        (UNetConfig, SD15_UNET, {"addition_embed_type": "text_time"}),
        (UNetConfig, SD15_UNET, {"addition_embed_type": "image"}),
        (UNetConfig, SD15_UNET, {"projection_class_embeddings_input_dim": 2816}),
        (UNetConfig, SDXL_UNET, {"addition_time_embed_dim": None}),
        (UNetConfig, SDXL_UNET, {"reverse_transformer_layers_per_block": [[10, 10], [2, 2], 1]}),
        (UNetConfig, SDXL_UNET, {"time_cond_proj_dim": 256}),
        (UNetConfig, SD21_UNET, {"dual_cross_attention": True}),
        (UNetConfig, SD15_UNET, {"num_attention_heads": 8}),
        (UNetConfig, SD15_UNET, {"freq_shift": 1}),
        (UNetConfig, SD15_UNET, {"only_cross_attention": [True, False, False, False]}),
        (UNetConfig, SD15_UNET, {"down_block_types": ["AttnDownBlock2D", *DOWN[1:]]}),
        (UNetConfig, SD15_UNET, {"up_block_types": UP[1:]}),
        (UNetConfig, SD15_UNET, {"attention_head_dim": [5, 10]}),
        (UNetConfig, SD15_UNET, {"block_out_channels": [320, 640, 1280, 1281]}),
        (UNetConfig, SD15_UNET, {"layers_per_block": [2, 2, 2, 1]}),
        (UNetConfig, SD15_UNET, {"layers_per_block": [2, 2]}),
        (UNetConfig, SD15_UNET, {"cross_attention_dim": [768, 768, 768, 1024]}),
        (UNetConfig, SD15_UNET, {"sample_size": [64, 64, 64]}),
        (UNetConfig, SD15_UNET, {"only_cross_attention": True}),
        (UNetConfig, SD15_UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}),
        (UNetConfig, SD15_UNET, {"layers_per_block": 10**6}),
        (UNetConfig, SD15_UNET, {"block_out_channels": 320}),
        (UNetConfig, SD15_UNET, {"block_out_channels": []}),
        (UNetConfig, SD15_UNET, {"sample_size": 1e999}),
        (UNetConfig, SD15_UNET, {"cross_attention_dim": None}),
        (UNetConfig, SD15_UNET, {"transformer_layers_per_block": [[1], 1, 1, 1]}),
        (UNetConfig, SD15_UNET, {"norm_num_groups": 0}),
        (UNetConfig, SD15_UNET, {"use_linear_projection": "yes"}),
        (VAEConfig, SD14_VAE, {"shift_factor": 0.1}),
        (VAEConfig, SDXL_VAE, {"latents_mean": [0.0, 0.0, 0.0, 0.0]}),
        (VAEConfig, SD14_VAE, {"use_quant_conv": False}),
        (VAEConfig, SD14_VAE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        (VAEConfig, SD14_VAE, {"up_block_types": ["UpDecoderBlock2D"] * 3}),
        (VAEConfig, SD14_VAE, {"down_block_types": None}),
        (VAEConfig, SD14_VAE, {"down_block_types": [["DownEncoderBlock2D"]] * 4}),
        (VAEConfig, SD14_VAE, {"block_out_channels": 128}),
        (VAEConfig, SD14_VAE, {"scaling_factor": -1}),
        (VAEConfig, SD14_VAE, {"norm_num_groups": 7}),
        (CLIPTextConfig, SD15_TEXT, {"model_type": "clip_vision_model"}),
        (CLIPTextConfig, SD15_TEXT, {"architectures": ["CLIPModel"]}),
        (CLIPTextConfig, SDXL_TEXT_2, {"projection_dim": "wide"}),
        (CLIPTextConfig, SD15_TEXT, {"hidden_act": "relu"}),
        (CLIPTextConfig, SD15_TEXT, {"num_attention_heads": 7}),
        (CLIPTextConfig, SD15_TEXT, {"hidden_size": 768.5}),
        (CLIPTextConfig, SD15_TEXT, {"is_decoder": True}),
        (CLIPTextConfig, SD15_TEXT, {"is_causal": False}),
        (CLIPTextConfig, SD15_TEXT, {"text_config": None}),
        (CLIPTextConfig, SD15_TEXT, {"quantization_config": {"bits": 4}}),
        (CLIPTextConfig, SDXL_TEXT_2, {"projection_dim": None}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_refused_in_one_line_that_names_file_and_key(kind, base, change):
    with pytest.raises(PSAError) as caught:
        kind.from_json(base | change, "some/config.json")
    text = str(caught.value)
    assert text.startswith("some/config.json: ")
    assert "\n" not in text
    (key,) = change
    # Where two keys must agree, the message may describe the clash by the other one's words.
    words = {"attention_head_dim": "attention_head_dim", "num_attention_heads": "heads"}
    words |= {"block_out_channels": "1281" if change.get(key) == [320, 640, 1280, 1281] else "block_out_channels"}
    words |= {"hidden_act": "relu", "norm_num_groups": "groups" if base is SD14_VAE else "norm_num_groups"}
    if key == "down_block_types" and kind is UNetConfig:
        assert "AttnDownBlock2D" in text
    else:
        assert words.get(key, key) in text
