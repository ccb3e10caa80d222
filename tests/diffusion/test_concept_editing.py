"""Unified Concept Editing, against the formula of its authors in torch, layer by layer, on pipelines of diffusers."""

import numpy as np
import pytest
import torch
from flax import nnx

from psa_jax.diffusion.concept_editing import Replacement, edit_concepts, read_replacements
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.weights import from_torch, is_stacked, torch_names

PAIRS = [Replacement("a cat at", "a"), Replacement("ca", "cat a cat"), Replacement("t", "t")]


def edited_by_torch(pipeline, pairs, stiffness: float) -> dict[str, np.ndarray]:
    """Weights of every cross-attention's keys and values: (λW + Σ v* cᵀ)(λI + Σ c cᵀ)⁻¹, in float64."""

    def state(text: str) -> torch.Tensor:
        states = pipeline.encode_prompt(
            prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return states[0, len(pipeline.tokenizer(text)["input_ids"]) - 2].double()

    found = {}
    for name, module in pipeline.unet.named_modules():
        if "attn2" in name and name.endswith(("to_k", "to_v")):
            weight = module.weight.double()
            left, right = stiffness * weight, stiffness * torch.eye(weight.shape[1], dtype=torch.float64)
            for pair in pairs:
                c, g = state(pair.concept), state(pair.guide)
                left = left + torch.outer(weight @ g, c)
                right = right + torch.outer(c, c)
            found[f"{name}.weight"] = (left @ torch.inverse(right)).numpy()
    return found


@pytest.mark.parametrize("family", ["smallest", "sdxl"])
@pytest.mark.parametrize("stiffness", [0.5, 5.0])
def test_every_cross_attention_of_diffusers(request, family, stiffness):
    """SDXL's transformer blocks are one array here, and its states are those of two encoders."""
    if family == "smallest":
        theirs, model = request.getfixturevalue("smallest_pipeline")
    else:
        folder, theirs = request.getfixturevalue("sdxl")
        model = load_stable_diffusion(folder)
    wanted = edited_by_torch(theirs, PAIRS, stiffness)
    before = dict(nnx.to_flat_state(nnx.state(model.unet)))
    seen = set()
    for path, leaf in nnx.to_flat_state(nnx.state(edit_concepts(model, PAIRS, stiffness).unet)):
        names = torch_names(path, leaf.shape)
        if names[0] not in wanted:
            np.testing.assert_array_equal(leaf[...], before[path][...])
            continue
        theirs_here = [from_torch(wanted[name], path) for name in names]
        np.testing.assert_allclose(leaf[...], np.stack(theirs_here) if is_stacked(path) else theirs_here[0], atol=1e-5)
        assert np.abs(np.asarray(leaf[...]) - np.asarray(before[path][...])).max() > 1e-3
        seen |= set(names)
    assert seen == set(wanted)


def test_what_is_preserved_alone_changes_nothing(smallest_pipeline):
    model = smallest_pipeline[1]
    same = edit_concepts(model, [Replacement("cat", "cat"), Replacement("a", "a")])
    before = dict(nnx.to_flat_state(nnx.state(model.unet)))
    for path, leaf in nnx.to_flat_state(nnx.state(same.unet)):
        np.testing.assert_allclose(leaf[...], before[path][...], atol=1e-6)


def test_files_of_pairs(tmp_path):
    (tmp_path / "c.csv").write_text("guide,concept,why\na flower,a spider,x\na,b\n")
    with pytest.raises(PSAError, match=r"c\.csv, line 3: 2 cells; the header has 3"):
        read_replacements(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("guide,concept,why\na flower,a spider,x\n")
    assert read_replacements(tmp_path / "c.csv") == [Replacement("a spider", "a flower")]
    (tmp_path / "c.csv").write_text("concept,guide\na spider,a flower\na spider,a cat\n")
    with pytest.raises(PSAError, match="line 3: the concept is there already; give each once"):
        read_replacements(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("concept,guide\na spider, \n")
    with pytest.raises(PSAError, match="line 2: guide has to be a name"):
        read_replacements(tmp_path / "c.csv")


def test_a_text_that_is_too_long(smallest_pipeline):
    with pytest.raises(PSAError, match="longer than the text encoder reads; shorten it"):
        edit_concepts(smallest_pipeline[1], [Replacement("cat " * 200, "a")])
