"""Model configurations, read from the `config.json` files of a diffusers folder.

Each key is a field of the configuration, a key with a fixed set of supported values, or a key without effect on the
result. Any other value is refused with the key's name, so a folder never loads as another model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from psa_jax.errors import PSAError

Config = TypeVar("Config", bound="FromJson")


MAX_SIZE = 1 << 24
MAX_LAYERS = 200
MAX_BLOCKS = 16
TIME_IDS = 6
"""Sizes and crop that SDXL is told in `time_ids`, in numbers."""
_QUANTISED = dict.fromkeys(("quantization_config", "compression_config", "transformers_weights"), (None,))


def _fits(value: Any, wanted: Any, largest: int = MAX_SIZE) -> bool:
    """Whether a parsed JSON value has a field's type, with all numbers in (0, largest]. An int passes as a float."""
    if get_origin(wanted) is UnionType:
        return any(_fits(value, option, largest) for option in get_args(wanted))
    if get_origin(wanted) is tuple:
        few = isinstance(value, tuple) and 0 < len(value) <= MAX_BLOCKS
        return few and all(_fits(item, get_args(wanted)[0], largest) for item in value)
    if value is None:
        return wanted is NoneType
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if wanted in (int, float):
        return isinstance(value, (int, float) if wanted is float else int) and 0 < value <= largest
    return isinstance(value, wanted)


class FromJson:
    """Strict construction from a parsed `config.json`."""

    #: key -> its supported values, with which these modules compute the same as the original
    _fixed: Mapping[str, tuple[Any, ...]] = {}
    #: key -> the original libraries' default, where it differs from the field's default here
    _absent: Mapping[str, Any] = {}
    #: keys for which the original accepts a list of equal numbers in place of the number -> length of the list
    _repeated: Mapping[str, Callable[[Mapping[str, Any]], int]] = {}

    @classmethod
    def from_json(cls: type[Config], config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Configuration of a parsed `config.json`.

        Args:
          config: its content.
          where: names the file in errors.

        Raises:
          PSAError: an unsupported or malformed value; the message names the first such key.
        """
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        fixed = _QUANTISED | cls._fixed
        values = dict(cls._absent)
        for key, value in config.items():
            if key in types:
                wanted = types[key]
                value = tuple(value) if isinstance(value, list) else value
                if key in cls._repeated and isinstance(value, tuple) and len(value) == cls._repeated[key](config):
                    value = value[0] if all(item == value[0] for item in value) else value
                if value is None and wanted is bool:  # the original reads null as false
                    value = False
                largest = MAX_LAYERS if "layers" in key else MAX_SIZE
                # Special tokens are the tokenizer's matter; files write −1 for none.
                token = key.endswith("_token_id") and type(value) is int and abs(value) <= MAX_SIZE
                if not token and not _fits(value, wanted, largest):
                    raise PSAError(
                        f"{where}: {key} = {_shown(config[key])} is not supported "
                        f"(expected {getattr(wanted, '__name__', wanted)}, above zero and at most {largest})"
                    )
                values[key] = float(value) if wanted is float else value
            elif key in fixed and not any(type(value) is type(one) and value == one for one in fixed[key]):
                raise PSAError(f"{where}: {key} = {_shown(value)} is not supported (only {fixed[key][0]!r})")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise PSAError(f"{where}: {error}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


@dataclasses.dataclass(frozen=True)
class UNetConfig(FromJson):
    """Sizes of diffusers' UNet2DConditionModel of SD1.x, SD2.x and SDXL, under diffusers' names.

    Attributes:
      sample_size: side of the latents, or (height, width), or None for a model without a size of its own.
      attention_head_dim: number of attention heads (sic, in diffusers), for all resolutions or for each.
      transformer_layers_per_block: blocks of a transformer stack, for all resolutions or for each.
      addition_embed_type: "text_time" for SDXL, whose pooled text and `time_ids` join the timestep embedding.
      addition_time_embed_dim: width of each embedded time id.
      projection_class_embeddings_input_dim: width of pooled text and embedded time ids together.
    """

    sample_size: int | tuple[int, ...] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    _fixed = {
        "center_input_sample": (False, None),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0, 0.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False, *([False] * blocks for blocks in range(1, MAX_BLOCKS + 1))),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0),
        "act_fn": ("silu", "swish"),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False, None),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False, None),
        "resnet_out_scale_factor": (1.0, 1),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False, None),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }
    _absent = {"cross_attention_dim": 1280, "sample_size": None}
    _repeated = dict.fromkeys(
        ("layers_per_block", "cross_attention_dim"),
        lambda config: len(config.get("down_block_types", UNetConfig.down_block_types)),
    )
    # Keys that the original reads and that have no effect here: `upcast_attention` (the softmax is always in float32),
    # `addition_embed_type_num_heads` (of embedding types that are refused), `dropout` (of the UNet's training).

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str = "config.json") -> "UNetConfig":
        """Configuration of a parsed `config.json`; arguments and errors as `FromJson.from_json`."""
        return super().from_json(_depths_that_are_read(config), where)

    def __post_init__(self):
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size {self.sample_size} is not supported (a side, height and width, or null)")
        blocks = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == blocks:
            raise ValueError(f"{blocks} block_out_channels need as many down_block_types and up_block_types")
        for types, known in (
            (self.down_block_types, ("CrossAttnDownBlock2D", "DownBlock2D")),
            (self.up_block_types, ("CrossAttnUpBlock2D", "UpBlock2D")),
        ):
            for name in types:
                if name not in known:
                    raise ValueError(f"block type {name!r} is not supported (only {', '.join(known)})")
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != blocks:
                raise ValueError(f"{name} needs one value or {blocks}, got {len(value)}")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % self.norm_num_groups or width % heads:
                raise ValueError(f"width {width} is not divisible by {self.norm_num_groups} groups and {heads} heads")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"addition_embed_type {self.addition_embed_type!r} is not supported (only null and 'text_time')"
            )
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            value = getattr(self, name)
            if (value is None) != (self.addition_embed_type is None):
                raise ValueError(
                    f"{name} = {value} does not go with addition_embed_type {self.addition_embed_type!r} "
                    "(text_time needs a number, null needs null)"
                )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text that joins the timestep embedding; 0 where none does."""
        if self.projection_class_embeddings_input_dim is None:
            return 0
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each resolution."""
        return self._per_block(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks in each attention stack of each resolution."""
        return self._per_block(self.transformer_layers_per_block)

    def _per_block(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    @property
    def cross_attentions(self) -> tuple[tuple[int, int], ...]:
        """(width, heads) of every cross-attention in adapter order: down, up, mid, as diffusers' `attn_processors`."""
        layers = []
        per_level = list(zip(self.block_out_channels, self.heads, self.depths, strict=True))
        for block_type, (width, heads, depth) in zip(self.down_block_types, per_level, strict=True):
            if block_type == "CrossAttnDownBlock2D":
                layers += [(width, heads)] * (self.layers_per_block * depth)
        for block_type, (width, heads, depth) in zip(self.up_block_types, reversed(per_level), strict=True):
            if block_type == "CrossAttnUpBlock2D":
                layers += [(width, heads)] * ((self.layers_per_block + 1) * depth)
        width, heads, depth = per_level[-1]
        return tuple(layers + [(width, heads)] * depth)


def model_family(unet: Any) -> str:
    """Model family of a UNet: "sd1", "sd2" or "sdxl". The turbo models belong to the last two.

    Args:
      unet: `UNetConfig`, or the configuration of diffusers' UNet2DConditionModel.
    """
    if unet.addition_embed_type is not None:
        return "sdxl"
    return "sd2" if unet.use_linear_projection else "sd1"


def _depths_that_are_read(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with depths of 1 in place of 0 where a resolution has no attention: SDXL's (0, 2, 10)."""
    depths, down, up = (
        config.get(key) for key in ("transformer_layers_per_block", "down_block_types", "up_block_types")
    )
    if not all(isinstance(one, (list, tuple)) for one in (depths, down, up)) or not len(depths) == len(down) == len(up):
        return config
    attends = [f"CrossAttn{way}Block2D" for way in ("Down", "Up")]
    read = [d == attends[0] or u == attends[1] for d, u in zip(down, reversed(up), strict=True)]
    read[-1:] = [True]  # by the middle block
    unread = [type(depth) is int and depth == 0 and not used for depth, used in zip(depths, read, strict=True)]
    new = [1 if one else depth for depth, one in zip(depths, unread, strict=True)]
    return {**config, "transformer_layers_per_block": new}


@dataclasses.dataclass(frozen=True)
class VAEConfig(FromJson):
    """Sizes of diffusers' AutoencoderKL, under diffusers' names."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    _fixed = {
        "act_fn": ("silu",),
        "shift_factor": (None, 0, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    }
    _absent = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}
    _repeated = {"sample_size": lambda config: 2}
    # `force_upcast` has no effect here: the VAE always runs in float32.

    @classmethod
    def from_json(cls: type[Config], config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Configuration of a parsed `config.json`; arguments and errors as `FromJson.from_json`."""
        made = super().from_json(config, where)
        blocks = len(made.block_out_channels)
        for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = config.get(key, [known])
            if (list(types) if isinstance(types, tuple) else types) != [known] * blocks:
                raise PSAError(f"{where}: {key} = {_shown(types)} is not supported (only {known} at every resolution)")
        return made

    def __post_init__(self):
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"width {width} of block_out_channels does not divide into {self.norm_num_groups} groups"
                )

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


_PLAIN, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(FromJson):
    """Sizes of transformers' CLIPTextModel, or CLIPTextModelWithProjection where `projection_dim` is a number."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 49407
    projection_dim: int | None = None

    _fixed = {
        "model_type": ("clip_text_model", "clip"),
        "is_causal": (True,),
        "is_decoder": (False, None),
        "is_encoder_decoder": (False, None),
        "add_cross_attention": (False, None),
        "pruned_heads": ({}, None),
    }
    _absent = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "pad_token_id": 1}

    @classmethod
    def from_json(cls: type[Config], config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Configuration of a parsed `config.json`; arguments and errors as `FromJson.from_json`."""
        # Every file has a `projection_dim`, but only the class named by `architectures` has the projection.
        architectures = config.get("architectures") or [_PLAIN]
        if architectures not in ([_PLAIN], [_PROJECTED]):
            raise PSAError(
                f"{where}: architectures = {_shown(architectures)} is not supported (only {_PLAIN}, {_PROJECTED})"
            )
        if "text_config" in config:  # a whole CLIP: transformers reads the text part
            if not isinstance(config["text_config"], Mapping):
                raise PSAError(
                    f"{where}: text_config = {_shown(config['text_config'])} is not supported (only an object)"
                )
            config = config["text_config"]
        projection = config.get("projection_dim", 512) if architectures == [_PROJECTED] else None
        if architectures == [_PROJECTED] and projection is None:
            raise PSAError(f"{where}: projection_dim = None is not supported (a {_PROJECTED} needs a number)")
        return super().from_json({**config, "projection_dim": projection}, where)

    @property
    def architecture(self) -> str:
        """Name of the class in transformers that has these parameters."""
        return _PLAIN if self.projection_dim is None else _PROJECTED

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported (only quick_gelu, gelu)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(FromJson):
    """Sizes of transformers' CLIPVisionModelWithProjection, or of the vision part of a whole CLIPModel."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    _fixed = {
        "model_type": ("clip_vision_model", "clip"),
        "num_channels": (3,),
        "pruned_heads": ({}, None),
    }
    _absent = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "projection_dim": 512,
    }

    @classmethod
    def from_json(cls: type[Config], config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Configuration of a parsed `config.json`; arguments and errors as `FromJson.from_json`."""
        part = config.get("vision_config")
        if part is None:
            return super().from_json(config, where)
        if not isinstance(part, Mapping):
            raise PSAError(f"{where}: vision_config = {_shown(part)} is not supported (only an object)")
        # The projection of a whole CLIP is as wide as it says itself, whatever its parts say.
        return super().from_json({**part, "projection_dim": config.get("projection_dim", 512)}, where)

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported (only quick_gelu, gelu)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than a patch of {self.patch_size}")
