"""psa_jax.torch in pipelines of diffusers: who is drawn for, who is refused, what is left behind."""

import inspect

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline
from support.torch_adapters import random_adapter
from support.torch_runtime import CALL, ENCODER, IDS, PROMPTS, difference, draw, latents, open_pipeline

from psa_jax.errors import PSAError
from psa_jax.interop.ip_adapter import to_ip_adapter
from psa_jax.interop.native import save_adapter, to_file
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig
from psa_jax.torch import load_adapter, load_psa
from psa_jax.torch.processors import cross_attentions
from psa_jax.torch.users import embeddings_of, scales_of

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("unconditional", ["off", "zeros", "same"])
@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_users_of_a_batch_are_not_mixed(pipe, files, table, kind, unconditional):
    psa = load_psa(pipe, files[kind], table=table)
    both = draw(psa, user=IDS, scale=[0.5, 1.0], unconditional=unconditional)
    alone = [
        draw(psa, rows=slice(i, i + 1), user=IDS[i], scale=[0.5, 1.0][i], unconditional=unconditional) for i in (0, 1)
    ]
    assert difference(both, np.concatenate(alone)) <= 1e-4
    other = draw(psa, user=IDS[::-1], scale=[0.5, 1.0], unconditional=unconditional)
    assert difference(both[:1], other[:1]) > 0.01
    assert difference(both[1:], other[1:]) > 0.01


def test_stock_diffusers_mixes_them(pipe, small_pipeline, table, tmp_path):
    """Why there is a runtime at all: huggingface/diffusers#9813."""
    config = AdapterConfig.for_unet(small_pipeline[1].unet.config, user_dim=ENCODER.dim, kind="published")
    adapter = random_adapter(config)
    native = to_file(adapter)
    arrays = {n: torch.from_numpy(t.copy()) for n, t in to_ip_adapter(native, config, tmp_path).items()}
    state = {
        group: {n.removeprefix(f"{group}."): t for n, t in arrays.items() if n.startswith(f"{group}.")}
        for group in ("image_proj", "ip_adapter")
    }
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    users = torch.from_numpy(table.lookup(IDS))[:, None]

    def stock(rows):
        embeds = torch.cat([torch.zeros_like(users[rows]), users[rows]])
        return draw(pipe, rows=rows, ip_adapter_image_embeds=[embeds])

    both, alone = stock(slice(0, 2)), [stock(slice(0, 1)), stock(slice(1, 2))]
    assert difference(both[:1], alone[0]) > 0.01
    pipe.unload_ip_adapter()

    save_adapter(adapter, tmp_path / "a.safetensors", {})
    psa = load_psa(pipe, tmp_path / "a.safetensors", table=table)
    assert difference(draw(psa, rows=slice(0, 1), user=IDS[0], unconditional="zeros"), alone[0]) <= 1e-4
    assert difference(draw(psa, user=IDS, unconditional="zeros"), np.concatenate(alone)) <= 1e-4


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_scale_zero_and_nobody_are_the_base_model(pipe, files, table, kind):
    base = draw(pipe)
    psa = load_psa(pipe, files[kind], table=table)
    assert difference(draw(psa, user=IDS, scale=0.0), base) <= 1e-6
    assert difference(draw(psa, allow_unprotected=True), base) <= 1e-6
    assert difference(draw(psa, user=IDS), base) > 0.01
    psa.unload()
    assert difference(draw(pipe), base) == 0


def test_several_pictures_a_prompt(pipe, files, table):
    psa = load_psa(pipe, files["text"], table=table)
    noise = latents()
    twice = psa(PROMPTS, user=IDS, num_images_per_prompt=2, latents=noise[[0, 0, 1, 1]], **CALL).images
    once = draw(psa, user=IDS)
    assert difference(twice, once[[0, 0, 1, 1]]) <= 1e-4
    # one user stands for all prompts
    assert difference(draw(psa, user=IDS[0])[:1], once[:1]) <= 1e-4


def test_without_guidance(pipe, files, table):
    psa = load_psa(pipe, files["concept"], table=table)
    both = draw(psa, user=IDS, guidance_scale=0.0)
    assert difference(both[1:], draw(psa, rows=slice(1, 2), user=IDS[1], guidance_scale=0.0)) <= 1e-4


def test_what_does_not_depend_on_the_step_is_worked_out_once_a_call(pipe, files, table, monkeypatch):
    psa, calls = load_psa(pipe, files["text"], table=table), []
    forward = psa.adapter.forward
    monkeypatch.setattr(psa.adapter, "forward", lambda *args: calls.append(args[0].shape) or forward(*args))
    draw(psa, user=IDS, num_inference_steps=6)
    draw(psa, user=IDS[::-1])
    assert calls == [(4, 77, 32)] * 2


def test_image_to_image_with_the_context(sd1, files, table):
    pipe = open_pipeline(sd1[0], StableDiffusionImg2ImgPipeline)
    psa = load_psa(pipe, files["text"], table=table)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def edit(user):
        with psa.applied(user):
            generator = torch.Generator().manual_seed(1)
            return pipe("a cat", image, 0.9, generator=generator, **CALL).images

    assert difference(edit(IDS[0]), edit(IDS[1])) > 0.001


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(sd1, pipe, files, table, kind, dtype):
    whole = draw(load_psa(pipe, files[kind], table=table), user=IDS)
    psa = load_psa(open_pipeline(sd1[0]).to(dtype), files[kind], table=table)
    drawn = psa(PROMPTS, user=IDS, latents=latents().to(dtype), **CALL).images
    assert np.isfinite(drawn).all()
    assert np.abs(drawn - whole).mean() <= (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("kind", ["text", "concept"])
def test_weights_that_are_elsewhere_until_they_are_used(pipe, files, table, kind):
    """Sequential CPU offload: outside its forward pass the UNet has no weights at all."""
    psa = load_psa(pipe, files[kind], table=table)
    expected = draw(psa, user=IDS)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    assert difference(draw(psa, user=IDS), expected) <= 1e-5


def test_an_adapter_of_another_family_of_the_same_sizes(sdxl, tmp_path):
    pipe = open_pipeline(sdxl[0], StableDiffusionXLPipeline)
    layers = tuple((a.inner_dim, a.heads) for a in cross_attentions(pipe.unet).values())
    config = AdapterConfig("text", 4, ENCODER.dim, 56, layers)
    save_adapter(random_adapter(config), tmp_path / "a.safetensors", {"family": "sd2"})
    with pytest.raises(PSAError, match="is for sd2, this pipeline is sdxl"):
        load_psa(pipe, tmp_path / "a.safetensors")


def test_save_pretrained(pipe, files, table, tmp_path):
    before = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    psa = load_psa(pipe, files["text"], table=table)
    expected = draw(psa, user=IDS)
    assert pipe.unet.state_dict().keys() == before.keys()
    psa.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "psa_adapter.safetensors").read_bytes() == files["text"].read_bytes()
    again = open_pipeline(tmp_path / "out")
    assert all(torch.equal(t, before[name]) for name, t in again.unet.state_dict().items())
    assert difference(draw(load_psa(again, tmp_path / "out", table=table), user=IDS), expected) == 0


def test_the_prompt_kind_needs_no_runtime(pipe, files, table):
    """The module alone, before any stock pipeline that takes `prompt_embeds`."""
    adapter, about = load_adapter(files["prompt"])
    assert about["kind"] == "prompt"
    users = torch.from_numpy(table.lookup(IDS))
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    embeds = adapter(embeds, users, torch.tensor([1.0, 1.0]))
    stock = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, latents=latents(), **CALL).images
    assert difference(stock, draw(load_psa(pipe, files["prompt"], table=table), user=IDS)) <= 1e-5


# --- refused


def says(message: str):
    return pytest.raises(PSAError, match=message)


def unchecked(function):
    """As users have it: here the types of arguments are checked on the way."""
    return inspect.unwrap(function)


def test_nobody(pipe, files, table):
    psa = load_psa(pipe, files["text"], table=table)
    with says("no user was given"):
        pipe("a cat", **CALL)
    with says("no user was given"):
        psa("a cat", **CALL)
    with says("no user was given"):
        pipe.unet(latents(), 3, torch.zeros(2, 77, 32))
    with says("no user was given"):
        load_psa(open_pipeline(pipe.config._name_or_path), files["prompt"]).pipe("a cat", **CALL)


def test_users_that_are_none(pipe, files, table):
    psa = load_psa(pipe, files["text"], table=table)
    with says("'0000099' is not in the embedding table"):
        draw(psa, user=["0000001", "0000099"])
    with says("2 users for 1 prompts"):
        psa("a cat", user=IDS, **CALL)
    with says("3 users for 2 prompts"):
        draw(psa, user=[*IDS, IDS[0]])
    with says("2 scales for 1 prompts"):
        psa("a cat", user=IDS[0], scale=[1.0, 2.0], **CALL)
    with says("scale must be finite"):
        draw(psa, user=IDS, scale=float("nan"))
    with says(r"shape \(2, 3\), the adapter needs \[n, 33\]"):
        draw(psa, user=np.zeros((2, 3), np.float32))
    with says("NaN or infinity"):
        draw(psa, user=np.full((1, ENCODER.dim), np.nan, np.float32))
    with says("unconditional 'on' is unknown"):
        draw(psa, user=IDS, unconditional="on")
    # Of a set or a dict nobody knows whose prompt is whose; other things are no embedding.
    numbers = torch.ones(2, 33)
    others = numbers.bool(), numbers.int().numpy(), numbers.to_sparse()
    for none in ([], set(IDS), dict.fromkeys(IDS, 0), 1, [1, 2], *others):
        with says("user must be a list of ids"):
            unchecked(embeddings_of)(none, psa.adapter.config, psa.table)
    for none in ("1", None, 1 + 0j, [[1.0], [1.0, 2.0]]):
        with says("scale must be a number"):
            unchecked(scales_of)(none)
    with psa.applied(IDS), says("generating for another user"):
        draw(psa, user=IDS)
    with says("not finite, and no picture is returned"):
        draw(psa, user=IDS, scale=1e30)
    expected = draw(psa, user=IDS)  # nothing stays behind
    assert np.isfinite(expected).all()
    assert difference(draw(psa, user=np.array(IDS)), expected) == 0


def test_ids_need_a_table(pipe, files):
    with says("table=FILE"):
        draw(load_psa(pipe, files["text"]), user=IDS)


def test_a_batch_that_changes_during_a_call(pipe, files, table):
    """Some callbacks switch guidance off half way."""
    psa = load_psa(pipe, files["text"], table=table)

    def stop_guidance(pipe, step, timestep, values):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}

    with says("do not change the batch or the guidance"):
        draw(psa, user=IDS, callback_on_step_end=stop_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def save(folder, about=None, config=None, **changes):
    """An adapter file for the small pipeline, or one that is not."""
    values = {"kind": "text", "tokens": 2, "user_dim": ENCODER.dim, "cross_dim": 32, "layers": LAYERS}
    path = folder / "a.safetensors"
    save_adapter(random_adapter(AdapterConfig(**values | changes)), path, about or {})
    return path


LAYERS = ((16, 8), (16, 8), (16, 8), (24, 8))


def test_layers_of_the_small_pipeline(small_pipeline):
    assert small_pipeline[1].unet.config.cross_attentions == LAYERS


def test_adapters_for_something_else(pipe, tmp_path):
    with says("is for sdxl, this pipeline is sd1"):
        load_psa(pipe, save(tmp_path, {"family": "sdxl"}))
    with says("4 cross-attentions of width 24, this one has 4 of width 32"):
        load_psa(pipe, save(tmp_path, cross_dim=24))
    with says("for another base model: 3 cross-attentions"):
        load_psa(pipe, save(tmp_path, layers=LAYERS[1:]))
    with says("for another base model"):
        load_psa(pipe, save(tmp_path, layers=((16, 4), *LAYERS[1:])))
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with says("not a whole safetensors file"):
        load_psa(pipe, path)
    with says("no such adapter file"):
        load_psa(pipe, tmp_path / "missing")
    torch.save({}, tmp_path / "a.bin")
    with says("a pickle may run code"):
        load_psa(pipe, tmp_path / "a.bin")
    assert not hasattr(pipe, "psa")


def test_an_adapter_that_is_not_finite(pipe, tmp_path):
    path = save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with says("values that are not finite"):
        load_psa(pipe, path)


def test_a_table_of_another_encoder(pipe, tmp_path, table):
    path = save(tmp_path, {"encoder": "qwen", "encoder_fingerprint": "qwen-7b-1", "standardised": False})
    with says(rf"encoder qwen \(qwen-7b-1\), the table was made by features \({table.fingerprint}\)"):
        load_psa(pipe, path, table=table)
    with says("needs embeddings of 12 numbers, the table has 33"):
        load_psa(pipe, save(tmp_path, user_dim=12), table=table)
    with says("standardised"):
        load_psa(pipe, save(tmp_path, {"standardised": False}), table=table.standardised())


def test_pipelines_that_are_none(pipe, files, monkeypatch):
    with says("is no pipeline of Stable Diffusion"):
        load_psa(DDPMPipeline(unet=pipe.vae, scheduler=pipe.scheduler), files["text"])
    load_psa(pipe, files["text"])
    with says("has a user adapter already"):
        load_psa(pipe, files["text"])
    monkeypatch.setattr(diffusers, "__version__", "0.30.3")
    with says(r"diffusers 0\.30\.3 is too old; psa_jax\.torch needs 0\.35 or newer"):
        load_psa(pipe, files["text"])
