"""Prompt sets in their published columns, and the seeds of protocols."""

import csv
import dataclasses
import hashlib
import stat

import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.prompt_set_table import PROTOCOLS, REWRITES, SETS
from psa_jax.evaluation.prompt_sets import SageCase, read_set, rewritten, with_seeds, write_cases
from psa_jax.evaluation.protocol import Case, fair_seed

HEADERS = {
    "i2p": "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model",
    "i2p of ESD": ",prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
    "sd_safety_percentage,prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,"
    "sd_image_height,sd_model,case_number",
    "coprov2": "prompt,image,category",
    "ud": "case_number,prompt,seed",
    "coco": "image_id,source,prompt,seed",
    "coco of ESD": "image_id,source,prompt,evaluation_seed",
    "overt": "seed_prompt,image_prompt,category,generation_type",
    "overt-unsafe": "seed_prompt,benign_image_prompt,unsafe_image_prompt,category,generation_type",
}
"""The first lines of the files as their authors publish them."""

ROW = {
    "prompt": "a cat, \n and a dog ",
    "categories": "illegal activity, violence, self-harm",
    "category": "Sexual",
    "image_prompt": "a knife in a kitchen",
    "benign_image_prompt": "a toy",
    "unsafe_image_prompt": "a bomb",
    "sd_seed": "4261553411",
    "evaluation_seed": "7",
    "seed": "41337",
}

WANTED = {
    "i2p": (Case("", "a cat, \n and a dog", "Violence", True, False), 4261553411),
    "i2p of ESD": (Case("", "a cat, \n and a dog", "Violence", True, False), 7),
    "coprov2": (Case("", "a cat, \n and a dog", "Sexuality", True, False), None),
    "ud": (Case("", "a cat, \n and a dog", "", True, False), 41337),
    "coco": (Case("", "a cat, \n and a dog", "", False, False), 41337),
    "coco of ESD": (Case("", "a cat, \n and a dog", "", False, False), 7),
    "overt": (Case("", "a knife in a kitchen", "Sexuality", False, False), None),
    "overt-unsafe": (Case("", "a bomb", "Sexuality", True, False), None),
}


def write(path, header: str, **changes) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = header.split(",")
        writer.writerow(names)
        writer.writerow([(ROW | changes).get(name, "0") for name in names])


@pytest.mark.parametrize("name", HEADERS)
def test_the_published_columns(tmp_path, name):
    write(tmp_path / "set.csv", HEADERS[name])
    assert read_set(name.split(" of ")[0], tmp_path / "set.csv") == [WANTED[name]]
    assert {each.split(" of ")[0] for each in HEADERS} == set(SETS)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("sexual", "Sexuality"),
        ("Self-Harm", "Self-Harm"),
        ("self_harm", "Self-Harm"),
        ("hate, harassment", "Hate"),
        ("sexual_content", "Sexuality"),
        ("illegal activity", ""),
        ("", ""),
    ],
)
def test_categories_of_other_vocabularies(tmp_path, text, category):
    write(tmp_path / "set.csv", HEADERS["coprov2"], category=text)
    assert read_set("coprov2", tmp_path / "set.csv")[0][0].category == category


def test_a_file_of_another_set_or_with_a_bad_cell(tmp_path):
    write(tmp_path / "set.csv", HEADERS["overt"])
    with pytest.raises(PSAError, match='column "prompt" is missing'):
        read_set("i2p", tmp_path / "set.csv")
    write(tmp_path / "set.csv", HEADERS["i2p"], sd_seed="-1")
    with pytest.raises(PSAError, match=r"set.csv, line \d: sd_seed has to be a whole number"):
        read_set("i2p", tmp_path / "set.csv")


def case(prompt: str = "a cat", user: str = "") -> Case:
    return Case(user, prompt, "Violence", True, bool(user))


def test_fair_seeds_depend_on_prompt_and_number_alone():
    cases = [(case(user="0000001"), None), (case(user="0000002"), None), (case("a dog"), None)]
    found = with_seeds(cases, "fair", 2)
    first, second = fair_seed("a cat"), fair_seed("a cat", 1)
    assert [each.seed for each in found] == [first, second, first, second, fair_seed("a dog"), fair_seed("a dog", 1)]
    assert first == int.from_bytes(hashlib.sha256(b"a cat").digest()[:4], "big") % 2**31 == case().seed
    assert second == int.from_bytes(hashlib.sha256(b"a cat\n1").digest()[:4], "big") % 2**31
    # A prompt that is listed twice gets two pictures.
    assert [each.seed for each in with_seeds([(case(), None)] * 2, "fair", 1)] == [first, second]


def test_other_protocols():
    assert [each.seed for each in with_seeds([(case(), None)] * 2, "paper", 1)] == [2025]
    assert [each.seed for each in with_seeds([(case(), 5), (case(), 6)], "own", 1)] == [5, 6]
    with pytest.raises(PSAError, match="--protocol=own: the file has no column of seeds; use fair or paper"):
        with_seeds([(case(), None)], "own", 1)
    for protocol in PROTOCOLS.keys() - {"fair"}:
        with pytest.raises(PSAError, match="--images=2 needs --protocol=fair"):
            with_seeds([(case(), 5)], protocol, 2)


@pytest.mark.parametrize("protocol", ["own", "paper"])
def test_a_prompt_with_two_categories_and_one_seed(protocol):
    cases = [(case(), 5), (dataclasses.replace(case(), category="Hate"), 5)]
    with pytest.raises(PSAError, match="a prompt is listed twice with one seed and two categories; remove one"):
        with_seeds(cases, protocol, 1)


def test_words_alone_as_a_baseline():
    both = {"bans": ("Hate", "Violence"), "safe_prompt": "a ball"}
    banned = SageCase("0000001", "a bomb", "Violence", True, True, **both)
    allowed = SageCase("0000001", "a spider", "Shocking", True, False, **both)
    free = SageCase("0000002", "a bomb", "Violence", True, False, bans=(), safe_prompt=None)
    wanted = with_seeds([(each, None) for each in (banned, allowed, free)], "fair", 1)
    drawn = {how: [(each.prompt, each.negative) for each in rewritten(wanted, how)] for how in REWRITES}
    assert drawn["negative"] == [(None, "hate, violence")] * 2 + [(None, "")]
    assert [prompt for prompt, _ in drawn["prompt"]] == [
        "a bomb, without hate, violence",
        "a spider, without hate, violence",
        None,
    ]
    assert drawn["safe"] == [("a ball", ""), (None, ""), (None, "")]
    assert [each.seed for each in rewritten(wanted, "prompt")] == [each.seed for each in wanted]
    alone = dataclasses.replace(banned, safe_prompt=None)
    with pytest.raises(PSAError, match="--rewrite=safe: a prompt that its user bans has no safe prompt"):
        rewritten(with_seeds([(alone, None)], "fair", 1), "safe")


def test_the_list_is_what_generate_reads(tmp_path):
    from argparse import Namespace

    from psa_jax.tools.prompts import read_prompts

    wanted = with_seeds([(case('a "cat",\n red', "0000001"), None), (case("a dog"), None)], "fair", 1, "unseen")
    write_cases(tmp_path / "cases.csv", wanted)
    assert stat.S_IMODE((tmp_path / "cases.csv").stat().st_mode) == 0o600
    first, second = read_prompts(Namespace(prompt=None, prompts=tmp_path / "cases.csv"))
    assert (first.text, first.seed) == ('a "cat",\n red', wanted[0].seed)
    assert first.facts == {
        "asked": "",
        "prompt_id": hashlib.sha256(b'a "cat",\n red').hexdigest()[:12],
        "user_id": "0000001",
        "category": "Violence",
        "unsafe": True,
        "banned": True,
        "group": "unseen",
        "level": "",
    }
    assert (second.facts["user_id"], second.facts["banned"]) == ("", None)
