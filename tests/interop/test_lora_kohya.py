"""kohya's LoRA files: merged as diffusers fuses them, pictures too, and by the formula where diffusers loses a part."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.torch_ldm import ldm_unet
from support.torch_lora import assert_weights, by_hand, fused, kohya, open_pipeline, random_pairs, weights_of
from support.torch_models import tensor

from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, open_folder
from psa_jax.interop.lora import merge_lora_into

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def in_ldm_order(pipeline, pairs):
    """The UNet's layers under the names of the original code, which kohya's scripts use for SDXL."""
    layers = {name: None for model, name in pairs if model == "unet"}
    named = ldm_unet({f"{name}.weight": torch.tensor(i) for i, name in enumerate(layers)}, pipeline.unet.config)
    by_number = {int(number): name.removesuffix(".weight") for name, number in named.items()}
    renamed = {name: by_number[i] for i, name in enumerate(layers)}
    return {
        (model, renamed.get(name, name) if model == "unet" else name): pair for (model, name), pair in pairs.items()
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_and_picture_are_those_that_diffusers_fuses(family, request, tmp_path):
    folder, pipeline = request.getfixturevalue(family)
    pairs = random_pairs(pipeline)
    named = pairs if family == "sd1" else in_ldm_order(pipeline, pairs)
    save_file(kohya(named, first="lora_te_" if family == "sd1" else "lora_te1_"), tmp_path / "lora.safetensors")
    theirs = fused(folder, tmp_path / "lora.safetensors", 0.7)
    ours = merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors", 0.7)
    assert_weights(ours, weights_of(theirs))
    assert_weights(ours, by_hand(pipeline, pairs, lambda _, rank: 0.7 / rank))

    noise, prompts = tensor(1, 4, 8, 8, seed=4), ["a cat"]
    expected = theirs(prompts, latents=noise.clone(), num_inference_steps=2, output_type="np").images
    model = load_stable_diffusion(folder, lora=tmp_path / "lora.safetensors", lora_scale=0.7)
    generator = Generator(model, steps=2, batch_size=1, guidance=7.5 if family == "sd1" else 5.0)
    drawn = generator.pixels(prompts, [1], latents=noise.permute(0, 2, 3, 1).numpy())
    assert expected.std() > 0.02, "a flat picture says little"
    assert np.abs(np.clip(drawn * 0.5 + 0.5, 0.0, 1.0) - expected).max() <= 1e-3
    plain = open_pipeline(folder)(prompts, latents=noise.clone(), num_inference_steps=2, output_type="np").images
    assert np.abs(plain - expected).max() > 0.05


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_both_ways_of_counting_blocks_are_one(family, request, tmp_path):
    """diffusers knows the original code's for SDXL alone, and `add_embedding` under that name alone."""
    folder, pipeline = request.getfixturevalue(family)
    pairs = random_pairs(pipeline)
    expected = by_hand(pipeline, pairs, lambda _, rank: 1 / rank)
    one, other = kohya(pairs, first="lora_te_"), kohya(in_ldm_order(pipeline, pairs), first="lora_te1_")
    # Side by side, as some tools write them, each layer counts once; diffusers leaves out the original code's.
    half = dict(list(other.items())[: len(other) // 2])
    for tensors in (one, other, one | {name: values.clone() for name, values in half.items()}):
        save_file(tensors, tmp_path / "lora.safetensors")
        assert_weights(merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors"), expected)

    twice = one | {name: 2 * values for name, values in half.items()}
    save_file(twice, tmp_path / "lora.safetensors")
    with pytest.raises(PSAError, match="are the same parameter with other numbers; delete one"):
        merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors")


def test_each_layer_has_its_own_rank_and_alpha(sdxl, tmp_path):
    """diffusers gives an attention's projections and a text encoder's layers the alpha that most layers have."""
    folder, pipeline = sdxl
    pairs = random_pairs(pipeline, rank=lambda name: 1 + len(name) % 3)
    alpha = lambda name: 0.5 * (len(name) % 4)  # noqa: E731
    tensors = kohya(in_ldm_order(pipeline, pairs), None)
    flat = {name.removesuffix(".lora_down.weight"): None for name in tensors if name.endswith(".lora_down.weight")}
    tensors |= {f"{n}.alpha": torch.tensor(alpha(layer)) for n, (_, layer) in zip(flat, pairs, strict=True)}
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = by_hand(pipeline, pairs, lambda name, rank: -1.5 * alpha(name) / rank)
    assert_weights(merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors", -1.5), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_files_and_alphas_that_are_whole_numbers(dtype, sd1, tmp_path):
    folder, pipeline = sd1
    pairs = {key: (down.to(dtype), up.to(dtype)) for key, (down, up) in random_pairs(pipeline).items()}
    expected = by_hand(pipeline, {k: (d.float(), u.float()) for k, (d, u) in pairs.items()}, lambda *_: 2 / 3)
    for alpha in (torch.tensor(2), torch.tensor([2], dtype=torch.int32), torch.tensor(2.0, dtype=dtype)):
        tensors = {name: alpha.clone() if name.endswith(".alpha") else value for name, value in kohya(pairs).items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        assert_weights(merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors"), expected)


def test_a_file_without_alpha_says_so(sd1, tmp_path, caplog):
    folder, pipeline = sd1
    pairs = random_pairs(pipeline, rank=lambda name: 1 + len(name) % 3)
    save_file(kohya(pairs, None), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING, "psa_jax"):
        ours = merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors")
    assert_weights(ours, weights_of(fused(folder, tmp_path / "lora.safetensors", 1.0)))
    assert_weights(ours, by_hand(pipeline, pairs, lambda *_: 1.0))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("psa_jax")]
    assert len(said) == 1 and f"does not say alpha for {len(pairs)} of its {len(pairs)} layers" in said[0]

    caplog.clear()
    save_file(kohya(pairs, 1.0), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING, "psa_jax"):
        merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors")
    assert not [record for record in caplog.records if record.name.startswith("psa_jax")]


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{LAYER}.hada_w1_a": torch.ones(2, 2)}, "is of LoHa"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "is of LoKr"),
        ({f"{LAYER}.lora_mid.weight": torch.ones(3, 3, 1, 1)}, "is of LoCon with a core tensor"),
        ({f"{LAYER}.dora_scale": torch.ones(32, 1)}, "is of DoRA"),
        ({f"{LAYER}.oft_blocks": torch.ones(2, 2)}, "is of OFT"),
        ({f"{LAYER}.on_input": torch.tensor(True)}, "is of IA3"),
        ({f"{LAYER}.diff": torch.ones(2, 2)}, "is of full weight differences"),
        ({f"{LAYER}.a1.weight": torch.ones(2, 2)}, "is of GLoRA"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "but alpha is one number"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "not finite"),
        ({f"{LAYER}.alpha": torch.tensor(True)}, "of dtype BOOL"),
        ({f"{LAYER}.lora_down.weight": torch.full((3, 24), torch.inf)}, "not finite"),
        ({f"{LAYER}.lora_down.weight": torch.full((3, 24), 1e300, dtype=torch.float64)}, "not finite in float32"),
        ({f"{LAYER}.lora_down.weight": torch.ones(3, 24, dtype=torch.int8)}, "of dtype I8"),
        ({f"{LAYER}.lora_down.weight": torch.ones(3, 24).to(torch.float8_e4m3fn)}, "of dtype F8_E4M3"),
        ({f"{LAYER}.lora_down.weight": torch.ones(3, 25)}, "for another base model"),
        ({"lora_unet_input_blocks_99_1_proj_in.alpha": torch.tensor(1.0)}, "is no layer of the unet here"),
        ({"lora_unet_conv_norm_out.alpha": torch.tensor(1.0)}, "is no layer of the unet here"),
        ({"lora_te_text_model_embeddings_token_embedding.alpha": torch.tensor(1.0)}, "is no layer of the text_encoder"),
        (
            {"lora_te2_text_projection.alpha": torch.tensor(1.0)},
            "changes text_encoder_2, and there is only text_encoder and unet here",
        ),
        ({"lora_te3_x.alpha": torch.tensor(1.0)}, "lora_te3_x.alpha does not say its model, as others of the file do"),
        ({".alpha": torch.tensor(1.0)}, "is no tensor of a LoRA"),
    ],
)
def test_other_methods_and_what_does_not_fit_are_named(tensors, words, sd1, tmp_path):
    folder, pipeline = sd1
    save_file(kohya(random_pairs(pipeline)) | tensors, tmp_path / "lora.safetensors")
    with pytest.raises(PSAError) as caught:
        merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors")
    line = str(caught.value)
    assert words in line and str(tmp_path) in line and "\n" not in line


def test_alphas_for_some_layers_alone_are_ambiguous(sd1, tmp_path):
    """kohya's scripts take the rank for the others, diffusers the alpha that most layers have."""
    tensors = kohya(random_pairs(sd1[1]))
    del tensors[f"{LAYER}.alpha"]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(PSAError, match="alpha is ambiguous: .* have none"):
        merge_lora_into(open_folder(sd1[0]).tensors, tmp_path / "lora.safetensors")


def test_numbers_that_go_beyond_float32_when_merged_are_refused(sd1, tmp_path):
    folder, pipeline = sd1
    pairs = {key: (1e30 * down, 1e30 * up) for key, (down, up) in random_pairs(pipeline).items()}
    save_file(kohya(pairs), tmp_path / "lora.safetensors")
    with pytest.raises(PSAError, match=r"lora.safetensors: .* goes beyond float32 when it is merged"):
        load_stable_diffusion(folder, lora=tmp_path / "lora.safetensors")
    with pytest.raises(PSAError, match="the strength of a LoRA is nan"):
        merge_lora_into(open_folder(folder).tensors, tmp_path / "lora.safetensors", float("nan"))
