"""Qwen2.5 folders as transformers writes them; one line for each that is not whole or of another kind."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from support.torch_qwen2 import CHAT, QWENS, save_qwen
from transformers import AutoTokenizer, Qwen2ForCausalLM
from transformers import Qwen2Config as TorchConfig

from psa_jax.errors import PSAError
from psa_jax.interop.qwen2 import load_qwen2, pad_left, qwen2_name
from psa_jax.interop.weights import abstract_model, parameter_count, torch_names
from psa_jax.models.qwen2 import Qwen2, Qwen2Config

TEXTS = ["a profile of a person, and pictures", "person, person: pictures\nüß <|im_end|>"]
# As released with Qwen2.5-7B-Instruct and Qwen2.5-0.5B-Instruct.
RELEASED_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
RELEASED_HALF_B = RELEASED_7B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a chat template, and the model and tokenizer of transformers that wrote it: read only."""
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *save_qwen(folder, "tied_groups", TEXTS, CHAT)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(saved[0], tmp_path / "model")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(ours: nnx.Module, theirs: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))


@pytest.mark.parametrize("name", QWENS)
def test_every_tensor_lands_in_its_place_sharded_or_not(name, tmp_path):
    theirs, _ = save_qwen(tmp_path / "whole", name, TEXTS)
    ours = load_qwen2(tmp_path / "whole").model
    layers = ours.transformer_blocks
    for number, layer in enumerate(theirs.model.layers):
        np.testing.assert_array_equal(layers.self_attn.k_proj.kernel[number], layer.self_attn.k_proj.weight.T)
        np.testing.assert_array_equal(layers.self_attn.q_proj.bias[number], layer.self_attn.q_proj.bias)
        np.testing.assert_array_equal(layers.mlp.down_proj.kernel[number], layer.mlp.down_proj.weight.T)
        np.testing.assert_array_equal(
            layers.post_attention_layernorm.scale[number], layer.post_attention_layernorm.weight
        )
    assert parameter_count(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert (ours.lm_head is None) == theirs.config.tie_word_embeddings

    save_qwen(tmp_path / "shards", name, TEXTS)
    (tmp_path / "shards" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    shards = load_qwen2(tmp_path / "shards")
    assert_equal(shards.model, ours)
    assert len(shards.fingerprint) == 64


@pytest.mark.parametrize("config", [RELEASED_7B, RELEASED_HALF_B], ids=["7B", "0.5B"])
def test_released_models_are_read_and_have_every_parameter(config):
    ours = abstract_model(Qwen2, Qwen2Config.from_json(config))
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(TorchConfig.from_dict(config))
    names = {name for path, leaf in nnx.to_flat_state(nnx.state(ours)) for name in torch_names(path, leaf.shape)}
    assert names == {qwen2_name(name) for name, _ in theirs.named_parameters()}
    assert parameter_count(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"] == 1e6


def test_absent_keys_mean_what_transformers_takes_them_for():
    ours, theirs = Qwen2Config.from_json({"model_type": "qwen2"}), TorchConfig()
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert Qwen2Config.from_json({"num_attention_heads": 8, "num_key_value_heads": None}).num_key_value_heads == 8
    assert Qwen2Config.from_json({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}).rope_theta == 5.0
    assert Qwen2Config.from_json({"hidden_size": 64, "head_dim": 6}).head_width == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 21}, "use_sliding_window = True .*21 of 28 layers"),
        ({"use_sliding_window": True, "max_window_layers": None}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types = .*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types = .*each layer"),
        ({"layer_types": [["full_attention"]] * 28}, "layer_types = .*each layer"),
        ({"layer_types": ["full_attention"], "num_hidden_layers": "1"}, "num_hidden_layers = '1'"),
        ({"layer_types": ["full_attention"] * 28, "num_hidden_layers": 28.0}, "num_hidden_layers = 28.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = .*yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters = .*linear"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters = .*partial"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta = 1000000.0, but rope_parameters has 10000.0"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures = .*Classification"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*bits"),
        ({"is_causal": False}, "is_causal = False"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling = .*linear"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}},
            "rope_theta = 1000000.0, but rope_scaling has 5",
        ),
        ({"rope_scaling": ["default"]}, "rope_scaling = "),
        ({"rope_scaling": {"rope_type": ["default"]}}, "rope_scaling = "),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}, "rope_type": {}}}, "rope_parameters = "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000"),
        ({"hidden_size": 10**40}, "hidden_size = 1000000"),
        ({"num_key_value_heads": 5}, "28 attention heads are not divisible by 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"hidden_size": "3584"}, "hidden_size = '3584'"),
        ({"head_dim": 7}, "7 wide: .* even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(PSAError, match=f"^here: .*{message}"):
        Qwen2Config.from_json(RELEASED_7B | change, "here")


def test_missing_extra_and_misshapen_tensors(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(PSAError, match=r"lm_head.weight has shape \(2, 2\)"):
        load_qwen2(folder)
    short = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(short, folder / "model.safetensors")
    with pytest.raises(PSAError, match="missing tensors: transformer_blocks.1.mlp"):
        load_qwen2(folder)
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", intermediate_size=50)
    with pytest.raises(PSAError, match=r"mlp\..* has shape \(.*48.*config.json asks for \(.*50"):
        load_qwen2(folder)
    edit(folder / "config.json", intermediate_size=48, tie_word_embeddings=False)
    with pytest.raises(PSAError, match="missing tensors: lm_head.weight"):
        load_qwen2(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PSAError, match="pytorch_model.bin is a pickle"):
        load_qwen2(folder)
    with pytest.raises(PSAError, match="no such model folder"):
        load_qwen2(tmp_path / "none")


def test_text_to_tokens_and_back_as_transformers_does_it(saved):
    folder, _, theirs = saved
    ours = load_qwen2(folder)
    again = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": TEXTS[0]}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(TEXTS[0]) == expected and expected.startswith("<|im_start|>user\n")
    assert ours.tokenize([*TEXTS, expected]) == again([*TEXTS, expected])["input_ids"]
    assert ours.tokenize([]) == []
    tokens = ours.tokenize([TEXTS[0]])[0]
    assert ours.decode(tokens) == TEXTS[0]
    assert ours.decode([*tokens, *ours.stop_tokens, *tokens]) == TEXTS[0]


def test_without_a_chat_template_the_text_stays(tmp_path):
    save_qwen(tmp_path, "odd", TEXTS)
    assert load_qwen2(tmp_path).chat(TEXTS[0]) == TEXTS[0]


def test_vocab_and_merges_files_are_enough_and_one_is_not(saved, folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PSAError, match=r"vocab.json: file not found; .*tokenizer.json"):
        load_qwen2(folder)
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    with pytest.raises(PSAError, match="merges.txt: file not found"):
        load_qwen2(folder)
    merges = "".join(" ".join(pair) + "\n" for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    assert load_qwen2(folder).tokenize(TEXTS) == saved[2](TEXTS)["input_ids"]


def test_a_tokenizer_that_is_broken_or_of_a_larger_model(folder):
    edit(folder / "config.json", vocab_size=280)
    with pytest.raises(PSAError, match="tokenizer has .* tokens, vocab_size is 280"):
        load_qwen2(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PSAError, match="not a Qwen2 tokenizer"):
        load_qwen2(folder)


def test_what_ends_a_reply(saved, folder):
    end = saved[2].convert_tokens_to_ids("<|im_end|>")
    assert load_qwen2(folder).stop_tokens == (end,)
    edit(folder / "generation_config.json", eos_token_id=[end, 7])
    assert load_qwen2(folder).stop_tokens == (end, 7)
    (folder / "generation_config.json").unlink()
    assert load_qwen2(folder).stop_tokens == (end,)
    for bad in (100_000, [end, "7"]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(PSAError, match="generation_config.json: eos_token_id .* is not a token"):
            load_qwen2(folder)


def test_the_fingerprint_moves_with_all_that_moves_the_states(saved, folder):
    before = load_qwen2(saved[0]).fingerprint
    assert load_qwen2(folder).fingerprint == before and len(before) == 64
    others = {load_qwen2(folder, dtype=jnp.bfloat16).fingerprint}
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    others.add(load_qwen2(folder).fingerprint)
    (folder / "chat_template.jinja").write_text(CHAT)
    assert load_qwen2(folder).fingerprint == before
    edit(folder / "config.json", rms_norm_eps=1e-5)
    others.add(load_qwen2(folder).fingerprint)
    shutil.copy(saved[0] / "config.json", folder)
    edit(folder / "generation_config.json", eos_token_id=7)
    others.add(load_qwen2(folder).fingerprint)
    shutil.copy(saved[0] / "generation_config.json", folder)
    assert load_qwen2(folder).fingerprint == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    others.add(load_qwen2(folder).fingerprint)
    assert before not in others and len(others) == 5


def test_the_fingerprint_is_of_what_is_loaded(saved, folder):
    """Another header, shards, a wider type of the same numbers, and a file beside: the same model."""
    model = load_qwen2(folder)
    before, by_files = model.fingerprint, model.files_fingerprint
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "note": "saved again"})
    save_file(tensors, folder / "model.fp16.safetensors")
    assert load_qwen2(folder).fingerprint == before and load_qwen2(folder).files_fingerprint != by_files
    (folder / "model.safetensors").unlink()
    saved[1].save_pretrained(folder / "shards", max_shard_size="20KB")
    for path in (folder / "shards").glob("model*"):
        shutil.move(path, folder)
    assert load_qwen2(folder).fingerprint == before


def test_pad_left():
    ids, mask = pad_left([[1, 2, 3], [4]], 4, pad_token=9)
    assert ids.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]] and ids.dtype == np.int32
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]
