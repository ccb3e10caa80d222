"""What diffusers lets one do to a pipeline between `load_psa` and the picture: the user is protected, or there is none.

Protected: the picture is that of the same change made before `load_psa`. Refused: one line, whose advice works.
"""

import copy
import types

import accelerate
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from peft import LoraConfig
from safetensors.torch import save_file
from support.torch_adapters import random_adapter
from support.torch_models import randomise, tensor
from support.torch_runtime import ENCODER, IDS, STEPS, difference, draw

from psa_jax.errors import PSAError
from psa_jax.interop.ip_adapter import to_ip_adapter
from psa_jax.interop.native import to_file
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.torch import load_psa
from psa_jax.torch.processors import cross_attentions

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of diffusers about its own switches
    pytest.mark.usefixtures("one_thread"),
]


# --- the changes; each takes the pipeline, and a folder to write to


def lora(pipe, folder):
    """Writes and loads a LoRA that changes the picture."""
    tensors = {}
    for index, (name, module) in enumerate(pipe.unet.named_modules()):
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
            tensors[f"unet.{name}.lora_A.weight"] = tensor(2, module.in_features, seed=index) * 0.3
            tensors[f"unet.{name}.lora_B.weight"] = tensor(module.out_features, 2, seed=index + 500) * 0.3
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "lora.safetensors")
    pipe.load_lora_weights(str(folder), weight_name="lora.safetensors", adapter_name="style")


def fused_lora(pipe, folder):
    lora(pipe, folder)
    pipe.fuse_lora()


def unfused_lora(pipe, folder):
    fused_lora(pipe, folder)
    pipe.unfuse_lora()


def unloaded_lora(pipe, folder):
    lora(pipe, folder)
    pipe.unload_lora_weights()


def weaker_lora(pipe, folder):
    lora(pipe, folder)
    pipe.set_adapters(["style"], adapter_weights=[0.5])


def disabled_lora(pipe, folder):
    lora(pipe, folder)
    pipe.disable_lora()


def added_lora(pipe, folder):
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))


def inverted_word(pipe, folder):
    folder.mkdir(exist_ok=True)
    save_file({"cat": tensor(1, pipe.text_encoder.config.hidden_size)}, folder / "word.safetensors")
    pipe.load_textual_inversion(str(folder), weight_name="word.safetensors", token="<cat>")


def other_text_encoder(pipe, folder):
    pipe.register_modules(text_encoder=randomise(copy.deepcopy(pipe.text_encoder), seed=9))


def other_weights(pipe, folder):
    pipe.unet.load_state_dict(randomise(copy.deepcopy(pipe.unet), seed=9).state_dict())


def offloaded(pipe, folder):
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def group_offloaded(pipe, folder):
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def stored_in_half(pipe, folder):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def ip_adapter(pipe, folder):
    folder.mkdir(exist_ok=True)
    layers = tuple((a.inner_dim, a.heads) for a in cross_attentions(pipe.unet).values())
    config = AdapterConfig("published", 4, ENCODER.dim, pipe.unet.config.cross_attention_dim, layers)
    arrays = to_ip_adapter(to_file(random_adapter(config)), config, folder)
    state = {"image_proj": {}, "ip_adapter": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition(".")
        state[group][rest] = torch.from_numpy(array.copy())
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)


def ip_adapter_and_gone(pipe, folder):
    ip_adapter(pipe, folder)
    pipe.unload_ip_adapter()


def one_processor(pipe, folder):
    next(iter(cross_attentions(pipe.unet).values())).set_processor(AttnProcessor2_0())


def xformers(pipe, folder):
    """What its switch does where xformers is installed."""
    for attention in cross_attentions(pipe.unet).values():
        attention.set_processor(XFormersAttnProcessor())


def other_unet(pipe, folder):
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config)


def copied_unet(pipe, folder):
    pipe.unet = copy.deepcopy(pipe.unet)


def registered_unet(pipe, folder):
    pipe.register_modules(unet=type(pipe.unet).from_config(pipe.unet.config))


def other_attention(pipe, folder):
    """A module of the library's in the place of one of its own."""
    block = next(m for m in pipe.unet.modules() if hasattr(m, "attn2"))
    block.attn2 = copy.deepcopy(block.attn2)
    block.attn2.set_processor(AttnProcessor2_0())


def other_encode_prompt(pipe, folder):
    pipe.encode_prompt = types.MethodType(type(pipe).encode_prompt, pipe)


def other_forward_of_attention(pipe, folder):
    """As prompt-to-prompt and its kin do."""
    attention = next(iter(cross_attentions(pipe.unet).values()))

    def forward(hidden_states, encoder_hidden_states=None, **_):
        return AttnProcessor2_0()(attention, hidden_states, encoder_hidden_states)

    attention.forward = forward


def other_forward_of_block(pipe, folder):
    block = next(m for m in pipe.unet.modules() if hasattr(m, "attn2"))
    block.forward = lambda hidden_states, *_, **__: hidden_states


def cache(pipe, folder):
    """The first step's prediction for all steps."""
    forward, kept = pipe.unet.forward, []

    def cached(*args, **kwargs):
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    pipe.unet.forward = cached


def deep_cache(pipe, folder):
    """The deep blocks are run in the first step alone."""
    middle, kept = pipe.unet.mid_block, []
    forward = middle.forward

    def cached(*args, **kwargs):
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    middle.forward = cached


def prediction_of_a_copy(pipe, folder):
    """Another network behind the same name."""
    other = copy.deepcopy(pipe.unet)
    other.set_attn_processor(AttnProcessor2_0())
    pipe.unet.forward = other.forward


def same_parts(pipe, folder):
    StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


def plain_processors(pipe, folder):
    pipe.unet.set_attn_processor(AttnProcessor())


def quietly(change):
    return lambda pipe, folder: change(pipe)


PROTECTED = {
    "to(device)": quietly(lambda p: p.to("cpu")),
    "to(dtype) and back": quietly(lambda p: p.to(torch.float64).to(torch.float32)),
    "unet.to(channels_last)": quietly(lambda p: p.unet.to(memory_format=torch.channels_last)),
    "vae.enable_slicing": quietly(lambda p: p.vae.enable_slicing()),
    "vae.enable_tiling": quietly(lambda p: p.vae.enable_tiling()),
    "enable_freeu": quietly(lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    "disable_freeu": quietly(lambda p: p.disable_freeu()),
    "scheduler = ": quietly(lambda p: setattr(p, "scheduler", DDIMScheduler.from_config(p.scheduler.config))),
    "register_modules(scheduler)": quietly(
        lambda p: p.register_modules(scheduler=EulerDiscreteScheduler.from_config(p.scheduler.config))
    ),
    "load_lora_weights": lora,
    "fuse_lora": fused_lora,
    "unfuse_lora": unfused_lora,
    "unload_lora_weights": unloaded_lora,
    "set_adapters": weaker_lora,
    "disable_lora": disabled_lora,
    "unet.add_adapter": added_lora,
    "load_textual_inversion": inverted_word,
    "register_modules(text_encoder)": other_text_encoder,
    "unet.load_state_dict": other_weights,
    "accelerate.cpu_offload": offloaded,
    "unet.enable_group_offload": group_offloaded,
    "unet.enable_layerwise_casting": stored_in_half,
    "unet.enable_gradient_checkpointing": quietly(lambda p: p.unet.enable_gradient_checkpointing()),
    "remove_all_hooks": quietly(lambda p: p.remove_all_hooks()),
    "maybe_free_model_hooks": quietly(lambda p: p.maybe_free_model_hooks()),
    "reset_device_map": quietly(lambda p: p.reset_device_map()),
    "save_pretrained": lambda p, folder: p.save_pretrained(folder),
    "from_pipe, unused": quietly(StableDiffusionImg2ImgPipeline.from_pipe),
    "components, unused": quietly(
        lambda p: StableDiffusionImg2ImgPipeline(**p.components, requires_safety_checker=False)
    ),
    "set_progress_bar_config": quietly(lambda p: p.set_progress_bar_config(disable=True)),
    "unet.set_attn_processor(its own)": quietly(lambda p: p.unet.set_attn_processor(p.unet.attn_processors)),
}

REFUSED = {
    "enable_attention_slicing": (quietly(lambda p: p.enable_attention_slicing()), r"enable_attention_slicing\(\) took"),
    "enable_attention_slicing(max)": (quietly(lambda p: p.enable_attention_slicing("max")), "slicing"),
    "disable_attention_slicing": (quietly(lambda p: p.disable_attention_slicing()), "a switch that was turned off"),
    "unet.set_attn_processor": (
        quietly(lambda p: p.unet.set_attn_processor(AttnProcessor())),
        r"set_attn_processor\(\)",
    ),
    "one processor": (one_processor, "took the user's adapter out"),
    "fuse_qkv_projections": (quietly(lambda p: p.fuse_qkv_projections()), r"fuse_qkv_projections\(\) took"),
    "enable_xformers_memory_efficient_attention": (xformers, "enable_xformers_memory_efficient_attention"),
    "disable_xformers_memory_efficient_attention": (
        quietly(lambda p: p.disable_xformers_memory_efficient_attention()),
        "a switch that was turned off",
    ),
    "load_ip_adapter": (ip_adapter, r"load_ip_adapter\(\) took .*one pipeline cannot have both"),
    "unload_ip_adapter": (ip_adapter_and_gone, "a switch that was turned off"),
    "unet = ": (other_unet, "pipe.unet is another UNet"),
    "unet = a copy": (copied_unet, "pipe.unet is another UNet"),
    "register_modules(unet)": (registered_unet, "pipe.unet is another UNet"),
    "another attention": (other_attention, "took the user's adapter out"),
    "encode_prompt = ": (other_encode_prompt, "pipe.encode_prompt was replaced"),
    "attention.forward = ": (other_forward_of_attention, "was not run in a step"),
    "block.forward = ": (other_forward_of_block, "was not run in a step"),
    "a cache of the prediction": (cache, "was not run in a step"),
    "a cache of deep blocks": (deep_cache, "was not run in a step"),
    "unet.forward of another": (prediction_of_a_copy, "was not run in a step"),
}

HERE_TO_STAY = {"attention.forward = ", "block.forward = ", "a cache of the prediction", "a cache of deep blocks"} | {
    "unet.forward of another"
}
"""What can only be done without."""


def test_there_are_more_than_thirty():
    assert not PROTECTED.keys() & REFUSED.keys()
    assert len(PROTECTED) + len(REFUSED) >= 50


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("text", name) for name in PROTECTED),
        *(("prompt", name) for name in ("load_lora_weights", "accelerate.cpu_offload", "scheduler = ")),
        *(("sdxl", name) for name in ("to(device)", "enable_freeu", "load_lora_weights", "accelerate.cpu_offload")),
    ],
)
def test_protected(models, table, tmp_path, kind, name):
    model, path = models[kind]
    before = copy.deepcopy(model)
    PROTECTED[name](before, tmp_path / "before")
    base = draw(before, **STEPS)
    expected = draw(load_psa(before, path, table=table), user=IDS, **STEPS)
    assert difference(expected, base) > 0.01

    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    PROTECTED[name](pipe, tmp_path / "after")
    assert difference(draw(psa, user=IDS, **STEPS), expected) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("text", name) for name in REFUSED),
        *(
            ("prompt", name)
            for name in (
                "enable_attention_slicing",
                "unet = ",
                "encode_prompt = ",
                "one processor",
                "a cache of deep blocks",
            )
        ),
        *(
            ("sdxl", name)
            for name in ("enable_attention_slicing", "fuse_qkv_projections", "load_ip_adapter", "unet = ")
        ),
    ],
)
def test_refused(models, table, tmp_path, kind, name):
    model, path = models[kind]
    change, message = REFUSED[name]
    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    expected = draw(psa, user=IDS, **STEPS)
    change(pipe, tmp_path)
    drawn = []
    with pytest.raises(PSAError, match=message) as raised:
        drawn.append(draw(psa, user=IDS, **STEPS))
    assert not drawn
    assert "\n" not in str(raised.value)
    if name in HERE_TO_STAY:
        return
    # The advice: after unload() the pipeline can be loaded again, and before load_psa the switch does no harm.
    if name == "load_ip_adapter":
        pipe.unload_ip_adapter()
    psa.unload()
    again = draw(load_psa(pipe, path, table=table), user=IDS, **STEPS)
    other = copy.deepcopy(model)
    change(other, tmp_path)
    if name == "load_ip_adapter":
        other.unload_ip_adapter()
    if "unet" not in name or "processor" in name or name == "unet = a copy":  # others have random weights
        assert difference(again, expected) <= 1e-5
        assert difference(draw(load_psa(other, path, table=table), user=IDS, **STEPS), expected) <= 1e-5


def test_a_switch_that_diffusers_refuses_changes_nothing(models, table):
    model, path = models["text"]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    expected = draw(psa, user=IDS, **STEPS)
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        psa.pipe.unet.set_default_attn_processor()
    assert difference(draw(psa, user=IDS, **STEPS), expected) == 0


# --- changed by a callback while a picture is drawn


def change_text(pipe, step, timestep, values):
    return {"prompt_embeds": values["prompt_embeds"].flip(0)}


def change_text_in_place(pipe, step, timestep, values):
    values["prompt_embeds"].mul_(0.5)
    return {}


def change_processors(pipe, step, timestep, values):
    pipe.enable_attention_slicing()
    return {}


def change_unet(pipe, step, timestep, values):
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    return {}


def change_scheduler(pipe, step, timestep, values):
    scheduler = pipe.scheduler
    pipe.scheduler = copy.copy(scheduler)
    return {}


DURING = {
    "other prompt_embeds": (change_text, "other text states"),
    "prompt_embeds in place": (change_text_in_place, "other text states"),
    "processors": (change_processors, r"enable_attention_slicing\(\) took"),
    "unet": (change_unet, "was not run in a step"),
    "scheduler": (change_scheduler, "did not use the steps of its own scheduler"),
}


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("name", DURING)
def test_changed_during_a_call(models, table, kind, name):
    model, path = models[kind]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    callback, message = DURING[name]
    with pytest.raises(PSAError, match=message):
        draw(
            psa,
            user=IDS,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_callbacks_that_leave_the_text_alone(models, table, kind):
    model, path = models[kind]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    seen = []
    drawn = draw(psa, user=IDS, callback_on_step_end=lambda pipe, step, t, values: seen.append(step) or {})
    assert seen == [0, 1, 2]
    assert difference(drawn, draw(psa, user=IDS)) == 0
