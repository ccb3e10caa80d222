"""Whole folders, single files and files of prompts, changed at random: opened, or one line.

What is opened of fifty changed folders draws what `StableDiffusionPipeline.from_pretrained` draws of them.
"""

import json
import random
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save
from test_fuzz_openers import changed_bytes, changed_json, changed_tensors, fuzz
from test_single_file import checkpoint

from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion, open_folder
from psa_jax.tools.prompts import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

DESCRIPTIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
THEIR_ERRORS = (TypeError, ValueError, OSError, KeyError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)
PROMPT_FILES = {
    "p.txt": "a cat\n\n a dog, sitting \nHund\u2028Katze\r\nein Café\n",
    "p.csv": 'prompt,negative,seed\na cat,,7\n"a dog, sitting",blurry,18446744073709551615\n',
    "p.tsv": "prompt\tseed\na cat\t7\nein Café\t\n",
}


def changed_prompts(text: str, rng: random.Random) -> bytes:
    """Characters changed, put in or taken out, another encoding, or changed bytes."""
    if rng.random() < 0.3:
        return changed_bytes(text.encode(), rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        put = rng.choice(
            ["", '"', ",", "\t", "\n", "\r", "\0", "\ufeff", "\u2028", "\x0c", "9" * 25, "-1", "seed", "😀"]
        )
        text = text[:at] + put + text[at + rng.randrange(3) :]
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")


Case = tuple[str, Callable[[random.Random], bytes], Callable[[Path], object]]


@pytest.fixture(scope="module")
def description_cases(sd1, tmp_path_factory) -> list[Case]:
    """One file of a folder is changed; the folder is opened as a whole, and is as before for the next."""
    model, made = shutil.copytree(sd1[0], tmp_path_factory.mktemp("fuzz") / "model"), []
    for file in DESCRIPTIONS:
        path = model / file
        tree = json.loads(path.read_text())

        def open_changed(changed: Path, path: Path = path, before: bytes = path.read_bytes()):
            path.write_bytes(changed.read_bytes())
            try:
                return open_folder(model)
            except PSAError as error:
                # `fuzz` asks for the changed file's place.
                assert str(model) in str(error), error
                raise PSAError(str(error).replace(str(model), str(changed.parent))) from error
            finally:
                path.write_bytes(before)

        made.append((path.name, lambda rng, tree=tree: changed_json(tree, rng), open_changed))
    return made


@pytest.fixture(scope="module")
def file_cases(sd1) -> list[Case]:
    """A single file of SD1.x with changed names, types and bytes; files of prompts."""
    folder, pipeline = sd1
    whole = save({name: tensor.clone() for name, tensor in checkpoint(pipeline).items()}, {"format": "pt"})

    def open_file(path: Path):
        return load_stable_diffusion(path, config=folder)

    made = [("model.safetensors", lambda rng: changed_tensors(whole, rng), open_file)]
    for name, text in PROMPT_FILES.items():

        def open_prompts(path: Path):
            return read_prompts(Namespace(prompt=None, prompts=path))

        made.append((name, lambda rng, text=text: changed_prompts(text, rng), open_prompts))
    return made


def run(cases: list[Case], folder: Path, count: int) -> dict[str, list[int]]:
    return {name: found for case in cases for name, found in fuzz([case], folder, count).items()}


def test_a_changed_folder_is_opened_or_refused_in_one_line(description_cases, tmp_path):
    counts = run(description_cases, tmp_path, 6)
    assert all(refused for _, refused in counts.values()), counts
    assert sum(opened for opened, _ in counts.values()) > 5, counts


def test_a_changed_file_is_read_or_refused_in_one_line(file_cases, tmp_path):
    counts = run(file_cases, tmp_path, 10)
    assert all(opened and refused for opened, refused in counts.values()), counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_changed_folders_and_files(description_cases, file_cases, tmp_path):
    print(run(description_cases, tmp_path, 100), run(file_cases, tmp_path, 100))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_changed_folder_that_is_opened_draws_what_diffusers_draws(sd1, tmp_path):
    """Fifty that both open, with weights as they were: pictures within 1e-4, where diffusers draws at all."""
    model, rng, compared, left_out = shutil.copytree(sd1[0], tmp_path / "model"), random.Random(11), 0, []
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    while compared < 50:
        file = rng.choice(DESCRIPTIONS)
        path = model / file
        before = path.read_bytes()
        path.write_bytes(changed_json(json.loads(before), rng))
        try:
            generator = Generator(load_stable_diffusion(model), steps=3, guidance=3.0, batch_size=1, size=(16, 16))
            theirs = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
            theirs.set_progress_bar_config(disable=True)
            expected = theirs(
                ["a cat at a cat"],
                latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
                num_inference_steps=3,
                guidance_scale=3.0,
                output_type="np",
            ).images
        except PSAError:
            continue
        except (*THEIR_ERRORS, StrictDataclassError) as error:
            left_out.append(f"{file}: {type(error).__name__}")  # nothing of theirs to compare with
            continue
        finally:
            changed, _ = path.read_bytes(), path.write_bytes(before)
        found = np.clip(generator.pixels(["a cat at a cat"], [0], latents=latents) * 0.5 + 0.5, 0, 1)
        assert np.abs(found - expected).max() <= 1e-4, (file, changed)
        compared += 1
    print(f"{compared} compared; opened here and not drawn by diffusers: {left_out}")
