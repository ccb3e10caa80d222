"""Pipelines that share a UNet or are copied, text states that are given, unload(), and pipelines that are refused."""

import copy
import gc
import pickle
import sys
import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch_runtime import CALL, IDS, STEPS, difference, draw, latents

from psa_jax.errors import PSAError
from psa_jax.torch import load_psa
from psa_jax.torch.processors import UserProcessor

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


# --- pipelines that share a UNet


def image_to_image(pipe, user=None, psa=None) -> np.ndarray:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call = dict(strength=0.9, num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="np")
    return (pipe("a cat", image, **call) if psa is None else psa("a cat", image, user=user, **call)).images


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_a_pipeline_of_the_same_parts(models, table, kind):
    model, path = models[kind]
    pipe = copy.deepcopy(model)
    alone = StableDiffusionImg2ImgPipeline(**copy.deepcopy(pipe).components, requires_safety_checker=False)
    expected = image_to_image(None, IDS[0], load_psa(alone, path, table=table))

    first = load_psa(pipe, path, table=table)
    mine = draw(first, user=IDS)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(PSAError, match="needs its own load_psa"):
        image_to_image(other)
    with pytest.raises(PSAError, match="needs its own load_psa"), first.applied(IDS[0]):
        image_to_image(other)
    second = load_psa(other, path, table=table)
    assert difference(image_to_image(None, IDS[0], second), expected) <= 1e-5
    with first.applied(IDS):
        with pytest.raises(PSAError, match="generating for another user"):
            image_to_image(None, IDS[1], second)
        assert difference(draw(pipe), mine) == 0
    first.unload()
    assert difference(image_to_image(None, IDS[0], second), expected) <= 1e-5
    with pytest.raises(PSAError, match="taken out by unload"):
        draw(first, user=IDS)
    with pytest.raises(PSAError, match="needs its own load_psa"):
        draw(pipe)
    assert difference(draw(load_psa(pipe, path, table=table), user=IDS), mine) == 0
    pipe.psa.unload()
    second.unload()
    assert difference(draw(pipe), draw(model)) == 0


def test_applied_around_another_pipeline(models, table):
    model, path = models["text"]
    psa, stranger = load_psa(copy.deepcopy(model), path, table=table), copy.deepcopy(model)
    with pytest.raises(PSAError, match="this pipeline was not called"), psa.applied(IDS):
        draw(stranger)


def test_unload_twice_and_what_others_put_there(models, table):
    model, path = models["text"]
    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    pipe.enable_attention_slicing()
    slicing = dict(pipe.unet.attn_processors)
    psa.unload()
    psa.unload()
    assert dict(pipe.unet.attn_processors) == slicing
    assert not any(isinstance(p, UserProcessor) for p in slicing.values())
    assert difference(draw(pipe, **STEPS), draw(model, **STEPS)) <= 1e-5
    assert "encode_prompt" not in vars(pipe)
    assert not hasattr(pipe.unet, "psa")


def test_an_encode_prompt_of_the_users_own_comes_back(models, table):
    model, path = models["text"]
    pipe, calls = copy.deepcopy(model), []
    stock = pipe.encode_prompt

    def encode_prompt(
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        **kwargs,
    ):
        calls.append(prompt)
        return stock(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            **kwargs,
        )

    pipe.encode_prompt = encode_prompt
    psa = load_psa(pipe, path, table=table)
    expected = draw(load_psa(copy.deepcopy(model), path, table=table), user=IDS, **STEPS)
    assert difference(draw(psa, user=IDS, **STEPS), expected) == 0
    assert len(calls) == 1
    psa.unload()
    assert pipe.encode_prompt is encode_prompt


def test_a_copied_pipeline_stands_alone(models, table):
    model, path = models["text"]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    expected = draw(psa, user=IDS, **STEPS)
    twin = copy.deepcopy(psa.pipe)
    assert difference(draw(twin.psa, user=IDS, **STEPS), expected) == 0
    twin.psa.unload()
    assert difference(draw(twin, **STEPS), draw(model, **STEPS)) == 0
    assert difference(draw(psa, user=IDS, **STEPS), expected) == 0


# --- prompts given as states


@pytest.mark.parametrize("unconditional", ["off", "zeros", "same"])
@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_states_of_encode_prompt_are_adapted_once(models, table, kind, unconditional):
    model, path = models[kind]
    pipe = copy.deepcopy(model)
    base = pipe.encode_prompt(["a cat", "cat on a cat"], "cpu", 1, True)
    psa = load_psa(pipe, path, table=table)
    expected = draw(psa, user=IDS, unconditional=unconditional)
    with psa.applied(IDS, unconditional=unconditional):
        states, negative = pipe.encode_prompt(["a cat", "cat on a cat"], "cpu", 1, True)
        for _ in range(2):
            given = pipe(latents=latents(), prompt_embeds=states, negative_prompt_embeds=negative, **CALL).images
            assert difference(given, expected) <= 1e-5
    for options in ({"prompt_embeds": base[0], "negative_prompt_embeds": base[1]}, {"prompt_embeds": base[0]}):
        given = psa(latents=latents(), user=IDS, unconditional=unconditional, **options, **CALL).images
        assert difference(given, expected) <= 1e-5


def test_adapted_states_beside_others(models, table):
    model, path = models["prompt"]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    with psa.applied(IDS[0]):
        states, _ = psa.pipe.encode_prompt(["a cat", "cat on a cat"], "cpu", 1, True)
        with pytest.raises(PSAError, match="prompt_embeds has rows that the adapter is in already"):
            psa.pipe(prompt_embeds=torch.cat([states[:1], states[:1] + 1]), num_inference_steps=1)


# --- pipelines that are refused


def test_pipelines_with_more_than_two_sides_of_guidance(models, table):
    model, path = models["text"]
    pag = diffusers.StableDiffusionPAGPipeline.from_pipe(copy.deepcopy(model), pag_applied_layers=["mid"])
    with pytest.raises(PSAError, match="the UNet generates 3 pictures"):
        load_psa(pag, path, table=table)("a cat", user=IDS[0], num_inference_steps=1)
    with pytest.raises(PSAError, match="is no pipeline of Stable Diffusion|is not that of Stable Diffusion"):
        load_psa(diffusers.StableDiffusionInstructPix2PixPipeline.from_pipe(copy.deepcopy(model)), path)


def test_no_cpu_offload_without_an_accelerator(models, table):
    """diffusers' own error, in one line of its own."""
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    model, path = models["text"]
    psa = load_psa(copy.deepcopy(model), path, table=table)
    for switch in (psa.pipe.enable_model_cpu_offload, psa.pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            switch()


# --- other pipelines, threads and copies


def test_another_pipeline_between_two_drawings(models, table):
    """It has a scheduler of its own, whose steps nobody watches: what its UNet runs were for is looked at later."""
    for kind in ("text", "prompt"):
        model, path = models[kind]
        pipe = copy.deepcopy(model)
        psa = load_psa(pipe, path, table=table)
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        with pytest.raises(PSAError, match="other text states"), psa.applied(IDS[0]):
            draw(pipe, rows=slice(1, 2))
            image_to_image(other)
            draw(pipe, rows=slice(1, 2))


def test_a_scheduler_that_is_replaced_while_it_draws(models, table):
    model, path = models["text"]
    pipe, base = copy.deepcopy(model), copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)

    def replace(pipe, step, timestep, values):
        pipe.scheduler = copy.copy(pipe.scheduler)
        vars(pipe.scheduler).pop("step", None)
        pipe.unet.forward = base.unet.forward
        return values

    with pytest.raises(PSAError, match="scheduler was replaced"), psa.applied(IDS):
        draw(pipe, callback_on_step_end=replace)


def test_threads_take_turns(models, table):
    """Each picture that is given out is its thread's; who comes too early is told, in one line."""
    model, path = models["text"]
    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    one = [draw(psa, user=user, rows=slice(1), num_inference_steps=1) for user in IDS]
    found, before = [], sys.getswitchinterval()

    def work(index: int, together: threading.Barrier) -> None:
        together.wait()
        try:
            picture = draw(psa, user=IDS[index], rows=slice(1), num_inference_steps=1)
            found.append("right" if difference(picture, one[index]) <= 1e-5 else "wrong")
        except Exception as error:  # told below
            found.append(f"{type(error).__name__}: {error}")

    sys.setswitchinterval(1e-5)
    try:
        for _ in range(15):
            together = threading.Barrier(2)
            threads = [threading.Thread(target=work, args=(index, together)) for index in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert set(found) <= {"right", "PSAError: the pipeline is generating for another user; wait until it is done"}
    assert found.count("right") >= 15


def test_a_copied_unet_is_free_after_unload(models, table):
    model, path = models["text"]
    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    pipe.unet = copy.deepcopy(pipe.unet)
    with pytest.raises(PSAError, match="another UNet"):
        draw(psa, user=IDS)
    psa.unload()
    psa = load_psa(pipe, path, table=table)
    expected = draw(psa, user=IDS)
    psa.unload()
    assert difference(draw(pipe), draw(model)) == 0

    dropped = copy.deepcopy(model)
    load_psa(dropped, path, table=table)
    parts = dropped.components
    del dropped
    gc.collect()
    again = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    psa = load_psa(again, path, table=table)
    assert difference(draw(psa, user=IDS), expected) == 0
    psa.unload()
    assert difference(draw(again), draw(model)) == 0


def test_a_copied_pipeline_unloads_its_own(models, table):
    model, path = models["text"]
    pipe = copy.deepcopy(model)
    expected = draw(load_psa(pipe, path, table=table), user=IDS)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(pipe)))
    assert difference(draw(copied.psa, user=IDS), expected) == 0
    copied.psa.unload()
    assert difference(draw(copied), draw(model)) == 0
    assert difference(draw(pipe.psa, user=IDS), expected) == 0


@pytest.mark.parametrize("user", [IDS[0], None])
def test_a_copy_that_is_made_during_a_call_draws_for_nobody(models, table, user):
    model, path = models["text"]
    pipe = copy.deepcopy(model)
    psa = load_psa(pipe, path, table=table)
    with psa.applied(user, allow_unprotected=user is None):
        draw(pipe)
        copied = copy.deepcopy(pipe)
    for other in (copied, pipe):
        with pytest.raises(PSAError, match="no user was given"):
            draw(other)
    assert difference(draw(copied.psa, user=IDS), draw(psa, user=IDS)) == 0
