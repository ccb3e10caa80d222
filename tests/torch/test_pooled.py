"""The edit of SDXL's pooled text in pipelines: by hand in stock diffusers, for each user, once, and never left out."""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from support.torch_adapters import (
    edited_pooled,
    file_tensors,
    gates_of_prompts,
    random_adapter,
    untrained_adapter,
)
from support.torch_models import tensor
from support.torch_runtime import (
    CALL,
    ENCODER,
    IDS,
    PROMPTS,
    difference,
    draw,
    latents,
    open_pipeline,
    run_compiled,
)

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_unet
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.torch import load_adapter, load_psa
from psa_jax.torch.comfyui import UserConditioning

pytestmark = [
    # diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"attention": {"tokens": 4}, "categories": {"tokens": 0, "gate": "categories"}}
EMBEDS = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"


@pytest.fixture(scope="module")
def model(sdxl):
    return open_pipeline(sdxl[0], StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def adapters(sdxl, tmp_path_factory):
    """Gate -> (adapter of JAX, its file); and an untrained one."""
    folder, unet = tmp_path_factory.mktemp("pooled"), load_unet(sdxl[0]).config
    found = {}
    for name, make in (("attention", random_adapter), ("categories", random_adapter), ("new", untrained_adapter)):
        sizes = SIZES.get(name, SIZES["categories"])
        config = AdapterConfig.for_unet(unet, user_dim=ENCODER.dim, kind="edit", pooled=True, **sizes)
        found[name] = make(config), folder / f"{name}.safetensors"
        about = {"family": "sdxl", "encoder": ENCODER.name, "encoder_fingerprint": ENCODER.fingerprint}
        save_adapter(found[name][0], found[name][1], about)
    return found


@pytest.fixture
def psa(model, adapters, table):
    return load_psa(copy.deepcopy(model), adapters["categories"][1], table=table)


def by_hand(adapter, text, pooled, users, scale):
    """e + s·g·(W_o gelu(W_1 e + b_1) + b_o) and the same of the pooled text, from the tensors of the file."""
    w, heads = file_tensors(adapter), 8
    gates = gates_of_prompts(w, text, users, heads)
    if adapter.config.by_categories:
        name = "prompt_adapter."
        hidden = F.gelu(F.linear(text, w[f"{name}hidden.weight"], w[f"{name}hidden.bias"]))
        made = F.linear(hidden, w[f"{name}to_out.weight"], w[f"{name}to_out.bias"])
        states = text + (scale[:, None] * gates)[..., None] * made
    else:
        from support.torch_adapters import prompt_states, user_tokens

        states = prompt_states(w, text, user_tokens(w, users, text.shape[-1]), scale[:, None, None], heads)
    return states, edited_pooled(w, pooled, gates, scale)


@pytest.mark.parametrize("unconditional", ["off", "zeros", "same"])
@pytest.mark.parametrize("gate", ["attention", "categories"])
def test_pictures_of_stock_diffusers_with_both_edited_by_hand(model, adapters, table, gate, unconditional):
    adapter, path = adapters[gate]
    users, scale = torch.from_numpy(table.lookup(IDS)), torch.tensor([0.5, 1.0])
    text, negative, pooled, negative_pooled = model.encode_prompt(PROMPTS, device="cpu", negative_prompt="a")
    states, new = by_hand(adapter, text, pooled, users, scale)
    if unconditional != "off":
        seen = users if unconditional == "same" else torch.zeros_like(users)
        negative, negative_pooled = by_hand(adapter, negative, negative_pooled, seen, scale)

    def stock(pooled):
        given = dict(zip(EMBEDS, (states, negative, pooled, negative_pooled), strict=True))
        return model(latents=latents(), **given, **CALL).images

    expected = stock(new)
    assert difference(expected, stock(pooled)) > 0.001  # the pooled text matters
    psa = load_psa(copy.deepcopy(model), path, table=table)
    options = {"user": IDS, "scale": [0.5, 1.0], "unconditional": unconditional, "negative_prompt": ["a"] * 2}
    assert difference(draw(psa, **options), expected) <= 1e-4
    # An absent negative prompt is zeros in this model; users of a batch are not mixed.
    both = draw(psa, **options | {"negative_prompt": None})
    for row in (0, 1):
        one = {"user": IDS[row], "scale": [0.5, 1.0][row], "unconditional": unconditional}
        assert difference(draw(psa, rows=slice(row, row + 1), **one), both[row : row + 1]) <= 1e-4


@pytest.mark.parametrize("gate", ["attention", "categories"])
def test_three_lines_of_stock_diffusers(model, adapters, table, gate):
    """Those of docs/export.md."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"(?:^    .*\n)+", page, re.M) if "negative_pooled = pipe" in block)
    adapter, users = load_adapter(adapters[gate][1])[0], torch.from_numpy(table.lookup(IDS[:1]))
    pipe = functools.partial(model, latents=latents(1), **CALL)
    pipe.encode_prompt = model.encode_prompt
    names = {"adapter": adapter, "user": users, "torch": torch, "pipe": pipe}
    exec(compile(re.sub(r"^    ", "", code, flags=re.M).replace("a street", PROMPTS[0]), "export.md", "exec"), names)
    psa = load_psa(copy.deepcopy(model), adapters[gate][1], table=table)
    drawn = draw(psa, rows=slice(0, 1), user=IDS[:1])
    assert difference(drawn[0], names["image"]) <= 1e-5


def test_scale_zero_nobody_and_untrained_are_the_base_model(model, adapters, table, psa):
    base = draw(model)
    assert difference(draw(psa, user=IDS, scale=0.0), base) == 0
    assert difference(draw(psa, user=None, allow_unprotected=True), base) == 0
    assert difference(draw(psa, gates=[0.0] * 7), base) == 0  # who bans nothing
    steps = [difference(draw(psa, user=IDS, scale=scale), base) for scale in (0.05, 0.1, 0.2)]
    assert 0 < steps[0] < steps[1] < steps[2]
    psa.unload()
    assert difference(draw(psa.pipe), base) == 0
    assert not psa.pipe.unet.add_embedding._forward_pre_hooks
    new = load_psa(copy.deepcopy(model), adapters["new"][1], table=table)
    for unconditional in ("off", "zeros", "same"):
        assert difference(draw(new, user=IDS, unconditional=unconditional), base) == 0


def test_several_pictures_a_prompt_without_guidance_and_half_precision(model, psa, adapters, table):
    noise, once = latents(), draw(psa, user=IDS)
    twice = psa(PROMPTS, user=IDS, num_images_per_prompt=2, latents=noise[[0, 0, 1, 1]], **CALL).images
    assert difference(twice, once[[0, 0, 1, 1]]) <= 1e-4
    both = draw(psa, user=IDS, guidance_scale=0.0)
    assert difference(both[1:], draw(psa, rows=slice(1, 2), user=IDS[1], guidance_scale=0.0)) <= 1e-4
    half = load_psa(copy.deepcopy(model).to(torch.bfloat16), adapters["categories"][1], table=table)
    drawn = half(PROMPTS, user=IDS, latents=latents().bfloat16(), **CALL).images
    assert np.isfinite(drawn).all() and np.abs(drawn - once).mean() <= 0.1


@pytest.mark.parametrize("unconditional", ["off", "zeros", "same"])
def test_states_of_encode_prompt_are_adapted_once(model, psa, unconditional):
    base = dict(zip(EMBEDS, model.encode_prompt(PROMPTS, device="cpu"), strict=True))
    expected = draw(psa, user=IDS, unconditional=unconditional)
    with psa.applied(IDS, unconditional=unconditional):
        made = dict(zip(EMBEDS, psa.pipe.encode_prompt(PROMPTS, device="cpu"), strict=True))
        assert not torch.equal(made["pooled_prompt_embeds"], base["pooled_prompt_embeds"])
        same = torch.equal(made["negative_pooled_prompt_embeds"], base["negative_pooled_prompt_embeds"])
        assert same == (unconditional == "off")
        for given in (made, made, base):
            drawn = psa.pipe(latents=latents(), **given, **CALL).images
            assert difference(drawn, expected) <= 1e-5
    drawn = psa(latents=latents(), user=IDS, unconditional=unconditional, **base, **CALL).images
    assert difference(drawn, expected) <= 1e-5


def test_half_adapted_text_is_refused(model, psa):
    base = dict(zip(EMBEDS, model.encode_prompt(PROMPTS, device="cpu"), strict=True))
    with psa.applied(IDS):
        made = dict(zip(EMBEDS, psa.pipe.encode_prompt(PROMPTS, device="cpu"), strict=True))

        def call(**given):
            return psa.pipe(latents=latents(), **base | given, **CALL)

        with pytest.raises(PSAError, match="prompt_embeds has the adapter in it already, pooled_prompt_embeds has it"):
            call(prompt_embeds=made["prompt_embeds"])
        with pytest.raises(PSAError, match="pooled_prompt_embeds has rows that the adapter is in already"):
            call(pooled_prompt_embeds=made["pooled_prompt_embeds"])
        mixed = torch.cat([made["pooled_prompt_embeds"][:1], base["pooled_prompt_embeds"][1:]])
        with pytest.raises(PSAError, match="pooled_prompt_embeds has rows that the adapter is in already"):
            call(pooled_prompt_embeds=mixed)
        call()


def test_another_pooled_text_in_a_step_is_refused(psa, table):
    def other(pipe, step, timestep, values):
        return {"add_text_embeds": values["add_text_embeds"].flip(0)}

    def in_place(pipe, step, timestep, values):
        values["add_text_embeds"].mul_(0.5)
        return {}

    for change in (other, in_place):
        options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["add_text_embeds"]}
        with pytest.raises(PSAError, match="another pooled text than the adapter made"):
            draw(psa, user=IDS, **options)
    twin = copy.deepcopy(psa.pipe)
    assert difference(draw(twin.psa, user=IDS), draw(psa, user=IDS)) == 0
    with pytest.raises(PSAError, match="another pooled text than the adapter made"):
        draw(twin.psa, user=IDS, **options)
    twin.psa.unload()
    hooks = [len(each.unet.add_embedding._forward_pre_hooks) for each in (twin, psa.pipe)]
    assert hooks == [0, 1]
    assert torch.isfinite(torch.from_numpy(draw(psa, user=None, allow_unprotected=True, **options))).all()


CHANGED = """
def other(pipe, step, timestep, values):
    return {"add_text_embeds": values["add_text_embeds"] * 0.5}

try:
    watched = dict(callback_on_step_end=other, callback_on_step_end_tensor_inputs=["add_text_embeds"])
    psa("a cat", user=users[0], **watched, **call)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_compiled_it_is_watched_all_the_same(sdxl, adapters):
    said = run_compiled("StableDiffusionXLPipeline", sdxl[0], adapters["categories"][1], CHANGED)
    assert said.startswith("PSAError") and "another pooled text than the adapter made" in said


def test_pipelines_without_that_pooled_text_are_refused(pipe, sdxl, tmp_path, small_pipeline):
    layers = small_pipeline[1].unet.config.cross_attentions
    config = AdapterConfig("edit", 0, ENCODER.dim, 32, layers, gate="categories", pooled=24)
    save_adapter(random_adapter(config), tmp_path / "a.safetensors", {})
    with pytest.raises(PSAError, match="edits a pooled text of 24 numbers, which this pipeline has not"):
        load_psa(pipe, tmp_path / "a.safetensors")
    unet = load_unet(sdxl[0]).config
    config = AdapterConfig("edit", 0, ENCODER.dim, 56, unet.cross_attentions, gate="categories", pooled=16)
    save_adapter(random_adapter(config), tmp_path / "b.safetensors", {})
    with pytest.raises(PSAError, match="edits a pooled text of 16 numbers, this pipeline's has 24"):
        load_psa(open_pipeline(sdxl[0], StableDiffusionXLPipeline), tmp_path / "b.safetensors")


@pytest.mark.parametrize("gate", ["attention", "categories"])
def test_exports_have_it_or_refuse(sdxl, adapters, tmp_path, gate):
    path = adapters[gate][1]
    for format_, extra in (("native", []), ("diffusers", [f"--model={sdxl[0]}"])):
        assert main(["export", str(path), f"--format={format_}", *extra, f"--out={tmp_path / format_}"]) == 0
        assert (tmp_path / format_ / "psa_adapter.safetensors").read_bytes() == path.read_bytes()
    refused = {"upstream": [], "ip-adapter": [], "baked": [f"--model={sdxl[0]}", '--profile={"age": 9}']}
    for format_, extra in refused.items():
        assert main(["export", str(path), f"--format={format_}", *extra, f"--out={tmp_path / format_}"]) == 1
        assert not (tmp_path / format_).exists()
    of_gates = main(["export", str(path), "--format=gates", f"--out={tmp_path / 'gates'}"])
    assert of_gates == (0 if gate == "categories" else 1)


@pytest.mark.parametrize("gate", ["attention", "categories"])
def test_in_comfyui(adapters, table, tmp_path, gate):
    table.save(tmp_path / "table.safetensors")
    known = {"user": IDS[0], "table": str(tmp_path / "table.safetensors")}
    text, pooled, path = tensor(1, 9, 56, seed=2), tensor(1, 24, seed=5), str(adapters[gate][1])
    more = {"pooled_output": pooled, "width": 64}
    (((states, changed),),) = UserConditioning().apply([[text, more]], path, 0.5, **known)
    wanted = by_hand(adapters[gate][0], text, pooled, torch.from_numpy(table.lookup(IDS[:1])), torch.tensor([0.5]))
    torch.testing.assert_close(states, wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(changed["pooled_output"], wanted[1], rtol=0, atol=1e-4)
    assert changed["width"] == 64 and more["pooled_output"] is pooled and not torch.equal(wanted[1], pooled)
    (((_, unchanged),),) = UserConditioning().apply([[text, more]], path, 0.0, **known)
    assert torch.equal(unchanged["pooled_output"], pooled)
    for without in ({}, {"pooled_output": None}):
        with pytest.raises(PSAError, match="the conditioning has no pooled_output; connect the node behind"):
            UserConditioning().apply([[text, without]], path, 0.5, **known)
    with pytest.raises(PSAError, match="a pooled text of 24 numbers, this one has 4"):
        UserConditioning().apply([[text, {"pooled_output": torch.ones(1, 4)}]], path, 0.5, **known)
