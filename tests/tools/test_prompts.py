"""Prompts from files and from the command line: nothing is cut in two, misread or cut off without a word."""

import json
import logging
from argparse import Namespace

import numpy as np
import pytest

from psa_jax.cli import main
from psa_jax.data import model_shards
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.tools.prompts import read_prompts

LONG = "a cat at " * 40
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines cuts, too

FILES = {
    "lines.txt": (b"a cat\n\n  a dog \n", [("a cat", None, None), ("a dog", None, None)]),
    "windows.txt": (b"\xef\xbb\xbfa cat\r\na dog\r\n", [("a cat", None, None), ("a dog", None, None)]),
    "separators.txt": (f"a{SEPARATORS}cat\na dog".encode(), [(f"a{SEPARATORS}cat", None, None), ("a dog", None, None)]),
    "no_suffix": ("שלום 🐈".encode(), [("שלום 🐈", None, None)]),
    "P.CSV": (b"prompt,seed\na cat,7\n\n", [("a cat", None, 7)]),
    "p.tsv": (b"prompt\tnegative\tseed\na cat, at last\tblurry\t\n", [("a cat, at last", "blurry", None)]),
    "excel.csv": (b'\xef\xbb\xbfseed,prompt\r\n1,"two, with\r\nlines"\r\n', [("two, with\nlines", None, 1)]),
    "separators.csv": (f"prompt\na{SEPARATORS}cat\n".encode(), [(f"a{SEPARATORS}cat", None, None)]),
}
REFUSED = {
    "utf16.txt": ("a cat".encode("utf-16"), "not UTF-8 text"),
    "utf16le.txt": ("a cat".encode("utf-16-le"), "zero bytes, as UTF-16 text"),
    "latin.txt": (b"caf\xe9", "not UTF-8 text"),
    "p.jsonl": (b'{"prompt": "a cat"}', ".jsonl is not read"),
    "p.XLSX": (b"PK", ".xlsx is not read"),
    "semicolons.csv": (b"prompt;seed\na cat;1\n", "with commas between"),
    "commas.tsv": (b"prompt,seed\na cat,1\n", "with tabs between"),
    "twice.csv": (b"prompt,seed,prompt\na cat,1,a dog\n", "each once"),
    "empty.csv": (b"prompt,seed\n,,\n", "line 2: more or fewer cells"),
    "blank.csv": (b"prompt,seed\n ,\n", "line 2: empty prompt"),
    "header.csv": (b"prompt,seed\n", r"header\.csv: holds no prompt"),
    "spaces.txt": (b" \n\n", r"spaces\.txt: holds no prompt"),
}


def read(path, content: bytes):
    path.write_bytes(content)
    prompts = read_prompts(Namespace(prompt=None, prompts=path))
    assert all(prompt.facts is None for prompt in prompts)
    return [tuple(prompt)[:3] for prompt in prompts]


@pytest.mark.parametrize("name", FILES)
def test_files_of_prompts(tmp_path, name):
    content, expected = FILES[name]
    assert read(tmp_path / name, content) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, name):
    content, says = REFUSED[name]
    with pytest.raises(PSAError, match=says):
        read(tmp_path / name, content)


@pytest.mark.parametrize("flag", ["--prompt", "--negative"])
def test_bytes_that_are_not_utf8_are_one_line(tmp_path, capsys, flag):
    """Python hands a Latin-1 é over as half a character."""
    words = ["generate", "--model=tiny", "--prompt=a", f"{flag}=caf\udce9", f"--out={tmp_path / 'out'}"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{flag}: character 4 is" in error and "--prompts FILE" in error


def test_half_characters_reach_no_tokenizer(small_pipeline):
    with pytest.raises(PSAError, match="prompt 2 of 2: character 3 is"):
        small_pipeline[1].token_ids(["a", "a \ud800"])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_cut_off_is_what_diffusers_says(family, request):
    folder, theirs = request.getfixturevalue(family)
    model = load_stable_diffusion(folder, abstract=("unet", "vae", "text_encoder", "text_encoder_2"))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(type(theirs).__module__)
    logger.addHandler(handler)
    try:
        theirs.encode_prompt(LONG, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    finally:
        logger.removeHandler(handler)
    short, lost = model.truncated(["a cat", LONG])
    assert short == "" and len(lost) > 20
    assert said[0].endswith(f"CLIP can only handle sequences up to 77 tokens: {[lost]}")
    assert model.truncated(["a " * 75, "a " * 75 + "b c"]) == ["", "b c"]  # two places are the marks of begin and end


def test_generate_says_what_is_cut_off_once(sd1, tmp_path, capsys, caplog):
    words = ["generate", f"--model={sd1[0]}", "--steps=1", "--guidance=1", f"--negative={LONG}b", "--prompt=a cat"]
    assert main([*words, f"--prompt={LONG}", "--images=2", "--batch-size=2", f"--out={tmp_path / 'out'}"]) == 0
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if "truncated" in line]
    assert len(told) == 2 and all("because CLIP can only handle sequences up to 77 tokens: " in line for line in told)
    assert told[0].startswith("psa-jax: prompt 'a cat at a cat at")
    assert json.loads(out.splitlines()[-1])["truncated"] == 2
    assert not caplog.records


def test_a_generator_warns_once_for_each_prompt(small_pipeline, caplog):
    generator = Generator(small_pipeline[1], steps=1, guidance=1.0, batch_size=1)
    generator._generate = lambda *_: np.zeros((1, *generator.size, 3), np.float32)
    for _ in range(2):
        generator.pixels([LONG, "a cat"], [0, 1])
    assert [record.getMessage().startswith("prompt 'a cat at") for record in caplog.records] == [True]


def test_build_says_how_many_captions_are_cut_off(small_pipeline, tmp_path, capsys, monkeypatch):
    captions = [f"{LONG}b", f"{LONG}c", f"{LONG}c", "a cat"]

    def build_shards(sage_dir, out, *, tokenizer, **_):
        assert tokenizer[0](captions).shape == (4, 77)
        return out

    monkeypatch.setattr(model_shards, "build_shards", build_shards)
    model_shards.build_for_model(small_pipeline[1], tmp_path, tmp_path / "out", resolution=16, family="sd1")
    error = capsys.readouterr().err
    assert error.startswith("psa-jax: 2 of 3 captions are too long; caption 'a cat at a cat")
    assert "up to 77 tokens: " in error and error.rstrip().endswith("b") and error.count("\n") == 1
