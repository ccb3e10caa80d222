"""Tokenizers of folders that are written here: readers that know vocab.json and merges.txt alone give equal tokens."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from support.torch_ldm import checkpoint
from support.torch_models import small_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from psa_jax.interop.diffusers import TINY, load_stable_diffusion, save_stable_diffusion
from psa_jax.interop.parts import read_tokenizer, save_tokenizer

PROMPTS = ["a cat, a dog", "Café: 3 cats?", "A  CAT's\thouse", "", "naïve 日本 cat 🙂"]
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def ids_by_vocabulary(folder: Path, prompts: list[str]) -> list[list[int]]:
    """Byte-pair encoding as CLIP's published code has it, from the two files: nothing else of the folder is read."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>")
    reader = Tokenizer(bpe)
    reader.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    reader.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reader.decoder = decoders.ByteLevel()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    return [[start, *encoding.ids, end] for encoding in reader.encode_batch(prompts)]


def assert_whole(folder: Path, tokenizer) -> None:
    """Both readers give the tokens of the tokenizer that was saved."""
    expected = tokenizer(PROMPTS)["input_ids"]
    assert ids_by_vocabulary(folder, PROMPTS) == expected
    again = read_tokenizer(folder)
    assert again(PROMPTS)["input_ids"] == expected
    for name in ("pad_token", "pad_token_id", "bos_token_id", "eos_token_id", "model_max_length"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0].startswith("#version") and all(len(line.split(" ")) == 2 for line in merges[1:])


@pytest.mark.parametrize("family", ["sd1", "sdxl", "tiny"])
def test_of_a_folder_that_has_tokenizer_json_alone(family, request, tmp_path):
    source = TINY if family == "tiny" else request.getfixturevalue(family)[0]
    assert not (source / "tokenizer" / "vocab.json").exists()
    model = load_stable_diffusion(source)
    save_stable_diffusion(model, tmp_path / "out")
    for name in ("tokenizer", "tokenizer_2")[: len(model.text_encoders)]:
        assert_whole(tmp_path / "out" / name, getattr(model, name))
        for file in (source / name).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()


def test_the_files_of_the_source_are_copied(sd1, tmp_path):
    """As released folders have them: vocab.json, merges.txt, special_tokens_map.json and keys that are unknown here."""
    folder = shutil.copytree(sd1[0], tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    small_tokenizer(folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config | {"errors": "replace", "x": 1}))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    before = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    model = load_stable_diffusion(folder)
    save_stable_diffusion(model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "tokenizer").iterdir()} == before
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.tokenizer(PROMPTS)["input_ids"] == model.tokenizer(PROMPTS)["input_ids"]


def test_of_a_single_file(sdxl, tmp_path):
    """Its tokenizers share one vocabulary and pad otherwise: what was asked for is written, not what was copied."""
    folder, pipeline = sdxl
    save_file({name: t.clone() for name, t in checkpoint(pipeline).items()}, tmp_path / "model.safetensors")
    for given in ({"config": folder}, {"tokenizer": folder, "config": folder}):
        model = load_stable_diffusion(tmp_path / "model.safetensors", **given)
        out = tmp_path / f"out{len(given)}"
        save_stable_diffusion(model, out)
        pads = [model.tokenizer.pad_token, model.tokenizer_2.pad_token]
        assert pads == ["<|endoftext|>", "!"]
        for name in ("tokenizer", "tokenizer_2"):
            assert_whole(out / name, getattr(model, name))


def test_words_that_were_added(sd1, tmp_path):
    tokenizer = read_tokenizer(sd1[0] / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(tmp_path / "source")
    tokenizer = read_tokenizer(tmp_path / "source")
    save_tokenizer(tokenizer, tmp_path / "out")
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert added == {"<my-cat>": tokenizer.convert_tokens_to_ids("<my-cat>")}
    text = ["a <my-cat> house"]
    assert read_tokenizer(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert_whole(tmp_path / "out", tokenizer)
