"""diffusers' pipelines around Stable Diffusion's UNet: which draw for a user, and which are refused."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, LCMScheduler, T2IAdapter, UNet2DConditionModel
from support.torch_adapters import random_adapter
from support.torch_models import randomise
from support.torch_runtime import ENCODER, IDS, difference

from psa_jax.errors import PSAError
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.torch import load_psa
from psa_jax.torch.processors import cross_attentions

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

SIDE = 16
IMAGE = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)


def other_unet(**changes: int) -> Callable[[Any], dict[str, Any]]:
    """Such as in_channels, of models that see a picture beside the latents."""

    def made(model) -> dict[str, Any]:
        return {"unet": randomise(UNet2DConditionModel.from_config(dict(model.unet.config) | changes), seed=5)}

    return made


def control(model) -> dict[str, Any]:
    """A ControlNet for pictures that are twice as large as the latents, as these small ones are."""
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 16))
    return {"controlnet": randomise(net, seed=3)}


def t2i(model) -> dict[str, Any]:
    net = T2IAdapter(channels=list(model.unet.config.block_out_channels), num_res_blocks=1, downscale_factor=2)
    return {"adapter": randomise(net, seed=4)}


def lcm(model) -> dict[str, Any]:
    """A UNet that is told the guidance, and the scheduler that goes with it."""
    return other_unet(time_cond_proj_dim=8)(model) | {"scheduler": LCMScheduler.from_config(model.scheduler.config)}


def nothing(model) -> dict[str, Any]:
    return {}


def middle(model) -> dict[str, Any]:
    return {"pag_applied_layers": ["mid"]}


class Case(NamedTuple):
    """What a pipeline is made with beside the model's parts, and called with beside the prompt."""

    parts: Callable[[Any], dict[str, Any]] = nothing
    call: dict[str, Any] = {}
    says: str = ""


_IMAGE = {"image": IMAGE, "strength": 0.9}
_INPAINT = {"image": IMAGE, "mask_image": MASK, "height": SIDE, "width": SIDE, "strength": 0.9}

WORKS = {
    "StableDiffusionPipeline": Case(),
    "StableDiffusionImg2ImgPipeline": Case(call=_IMAGE),
    "StableDiffusionInpaintPipeline": Case(call=_INPAINT),
    "StableDiffusionInpaintPipeline, 9 channels": Case(other_unet(in_channels=9), _INPAINT),
    "StableDiffusionControlNetPipeline": Case(control, {"image": IMAGE}),
    "StableDiffusionControlNetImg2ImgPipeline": Case(control, _IMAGE | {"control_image": IMAGE}),
    "StableDiffusionControlNetInpaintPipeline": Case(control, _INPAINT | {"control_image": IMAGE}),
    "StableDiffusionAdapterPipeline": Case(t2i, {"image": IMAGE}),
    "LatentConsistencyModelPipeline": Case(lcm, {"original_inference_steps": 10}),
    "StableDiffusionXLPipeline": Case(),
    "StableDiffusionXLImg2ImgPipeline": Case(call=_IMAGE),
    "StableDiffusionXLInpaintPipeline": Case(call=_INPAINT),
    "StableDiffusionXLControlNetPipeline": Case(control, {"image": IMAGE}),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(control, _IMAGE | {"control_image": IMAGE}),
    "StableDiffusionXLControlNetInpaintPipeline": Case(control, _INPAINT | {"control_image": IMAGE}),
}

_SIDES = "the UNet generates 3 pictures"
REFUSED = {
    "StableDiffusionPAGPipeline": Case(middle, says=_SIDES),
    "StableDiffusionXLPAGPipeline": Case(middle, says=_SIDES),
    "StableDiffusionSAGPipeline": Case(says="the UNet generates 1 pictures"),
    "StableDiffusionInstructPix2PixPipeline": Case(
        other_unet(in_channels=8), {"image": IMAGE}, "is no pipeline of Stable Diffusion"
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Case(
        other_unet(in_channels=8), {"image": IMAGE, "height": SIDE, "width": SIDE}, _SIDES
    ),
}


def make(models, name: str, case: Case):
    """The pipeline of random parts, its adapter's file, and how to draw with it."""
    model, path = models["sdxl" if "XL" in name else "text"]
    model = copy.deepcopy(model)
    kind = getattr(diffusers, name.partition(",")[0])
    parts = model.components | case.parts(model)
    if "XL" not in name:
        parts["requires_safety_checker"] = False
    pipe = kind(**{key: part for key, part in parts.items() if part is not None or key in kind._optional_components})
    pipe.set_progress_bar_config(disable=True)

    def draw(drawer, **options) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", "generator": generator}
        return drawer(prompt="a cat", **call, **case.call, **options).images

    return pipe, path, draw


@pytest.mark.parametrize("name", WORKS)
def test_it_draws_for_users(models, table, name):
    pipe, path, draw = make(models, name, WORKS[name])
    base = draw(pipe)
    psa = load_psa(pipe, path, table=table)
    first, second = (draw(psa, user=user) for user in IDS)
    assert difference(first, second) > 0.01
    assert difference(first, base) > 0.01
    assert difference(draw(psa, user=IDS[0], scale=0.0), base) <= 1e-5
    with pytest.raises(PSAError, match="no user was given"):
        draw(pipe)
    psa.unload()
    assert difference(draw(pipe), base) == 0


@pytest.fixture(scope="module")
def with_pooled_text(models, tmp_path_factory):
    """SDXL's pipeline, and an adapter that edits its pooled text as well."""
    pipe, path = models["sdxl"][0], tmp_path_factory.mktemp("pooled") / "a.safetensors"
    layers = tuple((a.inner_dim, a.heads) for a in cross_attentions(pipe.unet).values())
    config = AdapterConfig("edit", 4, ENCODER.dim, pipe.unet.config.cross_attention_dim, layers, pooled=24)
    save_adapter(random_adapter(config), path, {"family": "sdxl"})
    return {"sdxl": (pipe, path)}


@pytest.mark.parametrize("name", [name for name in WORKS if "XL" in name])
def test_it_draws_with_the_pooled_text_edited(with_pooled_text, table, name):
    pipe, path, draw = make(with_pooled_text, name, WORKS[name])
    base = draw(pipe)
    psa = load_psa(pipe, path, table=table)
    first, second = (draw(psa, user=user) for user in IDS)
    assert difference(first, second) > 0.01
    assert difference(draw(psa, user=IDS[0], scale=0.0), base) <= 1e-5
    psa.unload()
    assert difference(draw(pipe), base) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(models, table, name):
    pipe, path, draw = make(models, name, REFUSED[name])
    draw(pipe)
    with pytest.raises(PSAError, match=REFUSED[name].says):
        draw(load_psa(pipe, path, table=table), user=IDS[0])
