"""LoRA in the formats of diffusers and peft, of UNet and text encoders: merged as those libraries merge them."""

import copy
import json
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.torch_lora import assert_weights, by_hand, fused, random_pairs, weights_of
from transformers import CLIPTextModel

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import open_folder
from psa_jax.interop.lora import FILE_NAME, PEFT_CONFIG, PEFT_FILE, merge_lora_into

# peft asks transformers' models by a name that transformers 5 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# What diffusers looks for in the text encoders of files: attention and MLP.
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
OLD = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}


def merged(folder, path, scale=1.0):
    return merge_lora_into(open_folder(folder).tensors, path, scale)


def layers_of(pairs, model: str, bare: bool = False) -> dict[str, torch.Tensor]:
    """One model's tensors in peft's names, as diffusers' training scripts have them."""
    tensors = {}
    for (of, name), (down, up) in pairs.items():
        if of == model:
            name = name.removeprefix("text_model.") if bare else name
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


@pytest.mark.parametrize("bare", [False, True], ids=["text_model", "without"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_files_with_settings_of_each_model(family, bare, request, tmp_path):
    folder, pipeline = request.getfixturevalue(family)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pairs = {(m, n): p for (m, n), p in random_pairs(pipeline).items() if m == "unet" or n.endswith(TEXT_LAYERS)}
    alphas, arguments = {"unet": 6, "text_encoder": 2, "text_encoder_2": 5}, {}
    for model in {model for model, _ in pairs}:
        arguments[f"{model}_lora_layers"] = layers_of(pairs, model, bare)
        # Today's CLIPTextModel has no `text_model.`, whatever the file's tensors say.
        targets = sorted({name.rpartition(".lora_")[0] for name in layers_of(pairs, model, bare=True)})
        about = {"r": 3, "lora_alpha": alphas[model], "target_modules": targets}
        arguments[f"{model}_lora_adapter_metadata"] = about
    kind.save_lora_weights(tmp_path, **arguments)
    ours = merged(folder, tmp_path, 0.6)
    assert_weights(ours, weights_of(fused(folder, tmp_path, 0.6)))
    by_model = {model: {k: p for k, p in pairs.items() if k[0] == model} for model, _ in pairs}
    for model, own in by_model.items():
        assert_weights(ours, by_hand(pipeline, own, lambda _, rank, model=model: 0.6 * alphas[model] / rank))


def test_a_text_encoder_in_the_names_of_2023_with_alphas(sd1, tmp_path):
    """`to_q_lora.down` and `lora_linear_layer`, which diffusers wrote before it used peft; alphas as tensors."""
    folder, pipeline = sd1
    pairs = {k: p for k, p in random_pairs(pipeline).items() if k[0] == "text_encoder" and k[1].endswith(TEXT_LAYERS)}
    tensors, alphas = {}, {}
    for (model, name), (down, up) in pairs.items():
        head, _, last = name.rpartition(".")
        layer = f"{model}.{head}.{OLD[last]}" if last in OLD else f"{model}.{name}.lora_linear_layer"
        tensors |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
        alphas[f"{layer.removesuffix('.lora_linear_layer')}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_weights(merged(folder, tmp_path / "a.safetensors"), weights_of(fused(folder, tmp_path / "a.safetensors", 1)))
    save_file(tensors | alphas, tmp_path / "b.safetensors")
    assert_weights(merged(folder, tmp_path / "b.safetensors"), by_hand(pipeline, pairs, lambda _, rank: 6 / rank))


SPECIAL = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = {
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"],
    "rank_pattern": {"attn1.to_q": 3, "conv1": 1},
    "alpha_pattern": {SPECIAL: 9, "to_q": 5, "^mid_block.resnets.0.conv1": 0.5},
}
TEXT = {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"layers.0.self_attn.q_proj": 4}}


def peft_folder(model: torch.nn.Module, folder, **settings) -> dict[str, torch.Tensor]:
    """Writes a folder of peft with a random LoRA of a model; the model's weights after `merge_and_unload`."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **settings)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_is_what_peft_merges(rslora, sd1, tmp_path):
    folder, pipeline = sd1
    expected = peft_folder(pipeline.unet, tmp_path / "a", use_rslora=rslora, **UNET)
    for path in (tmp_path / "a", tmp_path / "a" / PEFT_FILE):
        ours = merged(folder, path)
        assert_weights(ours, {"unet": expected})
    before = open_folder(folder).tensors["text_encoder"].by_name
    assert all((before[n].all() == t.all()).all() for n, t in ours["text_encoder"].by_name.items())
    text = peft_folder(pipeline.text_encoder, tmp_path / "b", use_rslora=rslora, **TEXT)
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    assert_weights(merged(folder, tmp_path / "b"), {"text_encoder": text})
    # The same files from before transformers left `text_model.` out of CLIPTextModel, or after.
    tensors = load_file(tmp_path / "b" / PEFT_FILE)
    bare = {name.replace("model.text_model.", "model."): tensor for name, tensor in tensors.items()}
    for prefix in ("", "text_model."):
        renamed = {name.replace("base_model.model.", f"base_model.model.{prefix}"): t for name, t in bare.items()}
        save_file(renamed, tmp_path / "b" / PEFT_FILE)
        assert_weights(merged(folder, tmp_path / "b"), {"text_encoder": text})


def test_a_folder_of_peft_for_each_model(sdxl, tmp_path):
    folder, pipeline = sdxl
    expected = {
        model: peft_folder(getattr(pipeline, model), tmp_path / model, **(UNET if model == "unet" else TEXT))
        for model in ("unet", "text_encoder", "text_encoder_2")
    }
    for model, weights in expected.items():
        expected[model] = {n if model == "unet" else n.removeprefix("text_model."): t for n, t in weights.items()}
    assert_weights(merged(folder, tmp_path), expected)


def change_config(folder, **values) -> None:
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base model"),
        ({"init_lora_weights": {}}, "init_lora_weights"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes' is neither true nor false"),
        ({"r": 3}, "says rank 3 for"),
        ({"r": 0}, "r is 0, no rank"),
        ({"r": True}, "r is True, no rank"),
        ({"r": 2.0}, "r is 2.0, no rank"),
        ({"lora_alpha": "4"}, "lora_alpha is '4', no alpha"),
        ({"lora_alpha": 1e300}, "no alpha (a finite number)"),
        ({"lora_alpha": 10**400}, "no alpha (a finite number)"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], no object"),
        ({"rank_pattern": {"to_k": 10**9}}, "no rank"),
        ({"alpha_pattern": {"to_k": None}}, "no alpha"),
        ({"alpha_pattern": {".*to_k": 4}}, "holds the pattern '.*to_k'; only names"),
        ({"alpha_pattern": {"(.*)*(.*)*(.*)*(.*)*b": 4}}, "holds the pattern"),
        ({"alpha_pattern": {"a\nb": 4}}, "holds the pattern 'a\\nb'"),
    ],
)
def test_settings_that_are_not_done_here_are_named(values, words, sd1, tmp_path):
    peft_folder(sd1[1].unet, tmp_path, target_modules=["to_k"])
    change_config(tmp_path, **values)
    start = time.monotonic()
    with pytest.raises(PSAError) as caught:
        merged(sd1[0], tmp_path)
    line = str(caught.value)
    assert time.monotonic() - start < 5
    assert words in line and str(tmp_path / PEFT_CONFIG) in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested deeper"),
        ('{"unet.r": 3, "unet.r": 4}', "given twice"),
        ('{"unet.lora_alpha": NaN}', "NaN"),
        ('{"unet.lora_alpha": 1e400}', "not valid JSON"),
        ('{"unet.lora_alpha": 3, "lora_alpha": 4}', "say lora_alpha twice"),
        ('{"unet.r": 4}', "says rank 4 for"),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', "holds the pattern"),
    ],
)
def test_metadata_that_are_not_what_they_should_be(text, words, sd1, tmp_path):
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(3, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(16, 3, 1, 1),
    }
    path = tmp_path / FILE_NAME
    save_file(tensors, path, {"lora_adapter_metadata": text})
    with pytest.raises(PSAError) as caught:
        merged(sd1[0], tmp_path)
    line = str(caught.value)
    assert words in line and f"{path}: its lora_adapter_metadata" in line and "\n" not in line and len(line) < 500


def test_a_name_that_stands_twice_in_a_file(sd1, tmp_path):
    path = tmp_path / FILE_NAME
    save_file({"unet.conv_in.lora_A.weight": torch.ones(3, 4, 3, 3)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().strip()
    entry = header[1:-1].removeprefix('"__metadata__":{"format":"pt"},')
    twice = f"{{{entry},{entry}}}".encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + length :])
    with pytest.raises(PSAError, match="is given twice"):
        merged(sd1[0], path)


def test_paths_that_are_no_lora(sd1, tmp_path):
    folder, pipeline = sd1
    with pytest.raises(PSAError, match=r"none: LoRA weights not found"):
        merged(folder, tmp_path / "none")
    (tmp_path / "lora.pt").write_bytes(b"")
    for path in (tmp_path, tmp_path / "lora.pt"):
        with pytest.raises(PSAError, match=r"lora.pt is a pickle"):
            merged(folder, path)
    peft_folder(pipeline.unet, tmp_path / "a", target_modules=["to_k"])
    (tmp_path / "a" / PEFT_CONFIG).unlink()
    with pytest.raises(PSAError, match="is of peft, whose adapter_config.json holds alpha"):
        merged(folder, tmp_path / "a")
    peft_folder(pipeline.unet, tmp_path / "c", target_modules=["to_k"])
    (tmp_path / "c" / PEFT_FILE).rename(tmp_path / "c" / "adapter_model.bin")
    with pytest.raises(PSAError, match=r"adapter_model.bin is a pickle"):
        merged(folder, tmp_path / "c")
    for name in ("one", "two"):
        save_file({"x.alpha": torch.tensor(1.0)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(PSAError, match="give the file that you mean"):
        merged(folder, tmp_path)


def test_a_folder_of_peft_for_another_model(sd1, tmp_path):
    other = CLIPTextModel(copy.deepcopy(sd1[1].text_encoder.config))
    wider = torch.nn.ModuleDict({"encoder": torch.nn.Linear(5, 7)})
    for number, (model, targets) in enumerate([(other, ["q_proj"]), (wider, ["encoder"])]):
        peft_folder(model, tmp_path / str(number), target_modules=targets)
    merged(sd1[0], tmp_path / "0")
    with pytest.raises(PSAError, match="no model here has all its layers"):
        merged(sd1[0], tmp_path / "1")
