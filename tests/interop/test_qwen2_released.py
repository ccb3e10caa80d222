"""Qwen2.5 folders as they are released or left by tools: opened as transformers opens them, with the same states."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.torch_qwen2 import left_padded, save_qwen
from transformers import AutoModelForCausalLM

from psa_jax.errors import PSAError
from psa_jax.interop.qwen2 import load_qwen2

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random folders with the older spelling of config.json, as Qwen2.5 was released: read only."""
    made = {}
    for name in ("tied_groups", "untied"):
        made[name] = tmp_path_factory.mktemp(name)
        save_qwen(made[name], name, ["a profile of a person, and pictures"])
        config = json.loads((made[name] / "config.json").read_text())
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
        config |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
        config.pop("layer_types", None)
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


def config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(make):
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file(make(found), folder / WEIGHTS, {"format": "pt"})

    return change


def inv_freq(found):
    return found | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}


def of_the_base_model(found):
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def sharded(prefix: str):
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(found)
        parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for file, part in parts.items():
            save_file({name: found[name] for name in part}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: prefix + file for file, part in parts.items() for name in part}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


def head_alone(found):
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    return found


CHANGES = {
    "as released": lambda folder: None,
    "use_mrope": config(use_mrope=False),
    "unsloth": config(unsloth_fixed=True, unsloth_version="2025.3.19", _attn_implementation_autoset=True),
    "auto_map of another's code": config(auto_map={"AutoModel": "modeling.Model"}, tokenizer_class=None),
    "rope_scaling default": config(rope_scaling={"rope_type": "default", "type": "default"}),
    "rope_scaling of the older name": config(rope_scaling={"type": "default", "mrope_section": [1, 1, 2]}),
    "rope_scaling empty": config(rope_scaling={}),
    "rope_theta twice": config(rope_theta=10000, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
    "rope_theta elsewhere": config(rope_theta=7.0, rope_parameters={"rope_type": "default", "factor": 3.0}),
    "rope_scaling over rope_parameters": config(
        rope_theta=7, rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_scaling={"type": "default"}
    ),
    "window beyond the layers": config(use_sliding_window=True, sliding_window=4, max_window_layers=28),
    "window of no width": config(use_sliding_window=True, sliding_window=None, max_window_layers=0),
    "layers named": config(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    "dropout": config(attention_dropout=0.1),
    "swish": config(hidden_act="swish"),
    "no architectures": config(architectures=None),
    "pad token": config(pad_token_id=0, bos_token_id=3),
    "inv_freq": tensors(inv_freq),
    "tensors of the base model": tensors(of_the_base_model),
    "index": sharded(""),
    "index with ./": sharded("./"),
    "float64": tensors(lambda found: {name: tensor.double() for name, tensor in found.items()}),
}
OF_TIED = {
    "head beside the embeddings": tensors(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    "head alone": tensors(head_alone),
    "head of its own": tensors(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()}),
}


@pytest.mark.parametrize("name", [*CHANGES, *OF_TIED])
def test_transformers_opens_it_with_the_same_states(name, folders, tmp_path):
    tied = name in OF_TIED
    folder = shutil.copytree(folders["tied_groups" if tied else "untied"], tmp_path / "model")
    (CHANGES | OF_TIED)[name](folder)
    if name == "layers named":
        config(layer_types=["full_attention"] * 2)(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids, mask = left_padded([6, 9], 9)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    ours = load_qwen2(folder).model
    states = ours(jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray(mask.numpy(), bool)).last
    valid = mask.bool().numpy()
    np.testing.assert_allclose(np.asarray(states)[valid], expected.hidden_states[-1].numpy()[valid], atol=1e-4)
    if name != "tensors of the base model":  # of which transformers makes a head at random
        np.testing.assert_allclose(np.asarray(ours.logits(states))[valid], expected.logits.numpy()[valid], atol=1e-4)


def test_a_text_encoder_with_the_rest_of_clip_in_its_file(sd1, tmp_path):
    """`from_pretrained` of diffusers reads no more of it than the text model."""
    from diffusers import StableDiffusionPipeline

    from psa_jax.interop.diffusers import load_stable_diffusion

    folder = shutil.copytree(sd1[0], tmp_path / "model")
    path = folder / "text_encoder" / WEIGHTS
    extra = {
        "text_projection.weight": torch.ones(4, 4),
        "logit_scale": torch.ones(()),
        "visual_projection.weight": torch.ones(2),
    }
    extra |= {"vision_model.embeddings.class_embedding": torch.ones(3)}
    extra["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    found = load_file(path)
    save_file(found | extra, path, {"format": "pt"})
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["architectures"] = ["CLIPModel"]  # model_index.json says which class is meant
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = load_stable_diffusion(folder)
    ids = ours.tokenize(["a cat"])
    with torch.no_grad():
        expected = theirs.text_encoder(torch.from_numpy(ids).long())[0]
    np.testing.assert_allclose(np.asarray(ours.text_encoder(jnp.asarray(ids)).last), expected.numpy(), atol=1e-4)


def test_a_head_that_is_missing_where_it_is_not_tied(folders, tmp_path):
    folder = shutil.copytree(folders["tied_groups"], tmp_path / "model")
    config(tie_word_embeddings=False)(folder)
    with pytest.raises(PSAError, match="missing tensors: lm_head.weight"):
        load_qwen2(folder)
