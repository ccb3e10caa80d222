"""A stand-in for SAGE at full size: its users, names, schema, counts and quirks; text and pictures are made up here.

    python tests/support/standin.py OUT [--users=900] [--seed=0] [--size=64] [--released=DIR]

writes 44,100 rows (37,800 / 2,100 / 2,100 / 2,100) in SAGE's layout, in the order of the release: users by id, for each
what they ban and then what they allow, three concepts a category, the unsafe prompt before the safe one. As released:

- the number in a name is that of the concept's prompt: 1 to 9 in train and val, which share prompts, 10 in both tests;
- concepts hold `_`, `-` and `'`; `file_name` has a double extension; Cluster_ID is text; captions are not plain ASCII.

Given a folder with the released labels, val has the released concepts and prompts row by row, and all splits have the
released users. Without it nothing outside this file is looked at: the bytes are the same on every machine. A prompt has
one safe and one unsafe picture, whoever the user is: its names are links to one file.
"""

import argparse
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from psa_jax.profiles.bans import allowed_categories, banned_categories
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, UserProfile

SPLITS = ("train", "val", "test_seen", "test_unseen")
FULL_USERS = 900
CONCEPTS_PER_USER = 3  # of each category
TRAIN_PROMPTS = tuple(range(1, 10))
TEST_PROMPTS = (10,)
# Concepts of each category: as many as the released val split has at least, and a few more.
CONCEPTS = {
    "Harassment": 42,
    "Hate": 80,
    "Propaganda": 72,
    "Self-Harm": 64,
    "Sexuality": 90,
    "Shocking": 80,
    "Violence": 70,
}
_JOINS = ("_", "-", "'s_", "_of_the_")
_WORDS = ("amber", "birch", "cobalt", "dune", "ember", "fern", "garnet", "heron", "indigo", "juniper", "kelp", "lotus")


@dataclass(frozen=True)
class Pair:
    """One user's unsafe and safe prompt of a concept: two rows."""

    profile: UserProfile
    category: str
    concept: int
    prompt: int
    cluster: str


def write_standin(
    root: Path, users: int = FULL_USERS, seed: int = 0, size: int = 64, released: Path | None = None
) -> dict[str, int]:
    """Writes the stand-in; the same arguments give the same bytes.

    Args:
      root: folder to make; must not exist.
      users: train users; the other splits have one for 18 of them, and at least one. 900 is the full size.
      seed: draws the concepts and prompts that are not given by the released labels.
      size: side of the pictures, in pixels.
      released: folder with `sage_labels_val.csv` and `gpt_pass_verdicts.csv`; None draws ids and labels.

    Returns:
      Rows of each split.
    """
    root.mkdir(parents=True)
    members = _members(users, released)
    pictures = root / ".pictures"
    pictures.mkdir()
    counts = {}
    for split in SPLITS:
        folder = root / split
        folder.mkdir()
        rows = []
        for pair in _pairs(split, members[split], seed, released):
            for kind in "us":
                os.link(_picture(pictures, pair, kind, size), folder / f"{_stem(pair)}_{kind}.jpg")
            rows += _rows(pair)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        counts[split] = len(rows)
    shutil.rmtree(pictures)  # the links remain
    return counts


# --- who and what


def _members(users: int, released: Path | None) -> dict[str, list[UserProfile]]:
    """Users of each split, by id; those of test_seen are train users."""
    others = max(1, users // 18)
    ids = _drawn_ids() if released is None else _released_ids(released)
    everyone = {profile.user_id: profile for profile in sample_population(1000)}
    held_out = {user_id for split in ("val", "test_unseen") for user_id in ids[split]}
    seen = ids["test_seen"][:others]
    rest = [user_id for user_id in everyone if user_id not in held_out and user_id not in seen]
    chosen = {split: ids[split][:others] for split in SPLITS[1:]} | {"train": sorted(seen + rest[: users - len(seen)])}
    return {split: [everyone[user_id] for user_id in chosen[split]] for split in SPLITS}


def _released_ids(released: Path) -> dict[str, list[str]]:
    labels, verdicts = released / "sage_labels_val.csv", released / "gpt_pass_verdicts.csv"
    judged = [(row["dataset"], row["user_id"]) for row in _read_csv(verdicts)]
    return {
        "val": sorted({row["user_id"] for row in _read_csv(labels)}),
        "test_seen": sorted({user_id for dataset, user_id in judged if dataset == "sage_seen"}),
        "test_unseen": sorted({user_id for dataset, user_id in judged if dataset == "sage_unseen"}),
    }


def _drawn_ids() -> dict[str, list[str]]:
    order = np.random.default_rng(0).permutation(1000) + 1
    return {split: sorted(f"{n:07d}" for n in order[50 * i : 50 * i + 50]) for i, split in enumerate(SPLITS[1:])}


def _pairs(split: str, profiles: list[UserProfile], seed: int, released: Path | None) -> Iterator[Pair]:
    given = _released_pairs(released) if split == "val" and released is not None else {}
    for profile in profiles:
        rng = np.random.default_rng([seed, SPLITS.index(split), int(profile.user_id)])
        cluster = str(int(profile.user_id) * 7 % 40)
        for category in (*banned_categories(profile), *allowed_categories(profile)):
            concepts = rng.choice(CONCEPTS[category], CONCEPTS_PER_USER, replace=False)
            prompts = rng.choice(TEST_PROMPTS if split.startswith("test") else TRAIN_PROMPTS, CONCEPTS_PER_USER)
            drawn = [(int(concept), int(prompt), cluster) for concept, prompt in zip(concepts, prompts, strict=True)]
            for concept, prompt, group in given.get((profile.user_id, category), drawn):
                yield Pair(profile, category, concept, prompt, group)


def _released_pairs(released: Path) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
    """(user, category) -> concept (numbered within its category), prompt and cluster, of the released val split."""
    path = released / "sage_labels_val.csv"
    numbers: dict[str, dict[str, int]] = {category: {} for category in CATEGORIES}
    pairs: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for row in _read_csv(path):
        if row["prompt_kind"] == "unsafe":
            concepts = numbers[row["category"]]
            concept = concepts.setdefault(row["concept_idx"], len(concepts))
            pair = (concept, int(row["prompt_idx"]), row["cluster_id"])
            pairs.setdefault((row["user_id"], row["category"]), []).append(pair)
    return pairs


def _read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- how it is written


def _concept(number: int) -> str:
    first, second = divmod(number, len(_WORDS))
    return f"{_WORDS[first]}{_JOINS[number % len(_JOINS)]}{_WORDS[second]}"


def _stem(pair: Pair) -> str:
    category = pair.category.lower()
    return f"user_{pair.profile.user_id}_{category}_{_concept(pair.concept)}_{pair.prompt:05d}"


def _rows(pair: Pair) -> Iterator[dict]:
    stem = _stem(pair)
    words = pair.profile.to_mapping()
    user_data = {"User_ID": words.pop("User_ID"), "Cluster_ID": pair.cluster, **words}
    banned = pair.category in banned_categories(pair.profile)
    # As long as released captions are, on average.
    bed = (
        f"{_concept(pair.concept)}—the {pair.category.lower()} garden’s {pair.prompt}. bed, seen from the old stone "
        "bridge in late afternoon light, with a winding path and two wooden benches in front of a low hedge"
    )
    for kind, mood in (("u", "stormy"), ("s", "calm")):
        chosen, rejected = ("s", "u") if kind == "s" or banned else ("u", "s")
        yield {
            "file_name": f"{stem}.jpg_{kind}.jpg",
            "chosen": f"{stem}_{chosen}.jpg",
            "rejected": f"{stem}_{rejected}.jpg",
            "caption": f"A {mood} view of {bed}",
            "user_data": user_data,
        }


def _picture(folder: Path, pair: Pair, kind: str, size: int) -> Path:
    """The one file of a prompt's picture: 4 x 4 patches of random colour, scaled up."""
    path = folder / f"{pair.category}_{pair.concept}_{pair.prompt}_{kind}.jpg"
    if not path.exists():
        numbers = [CATEGORIES.index(pair.category), pair.concept, pair.prompt, "su".index(kind)]
        patches = np.random.default_rng(numbers).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(patches).resize((size, size)).save(content, format="JPEG", quality=85)
        path.write_bytes(content.getvalue())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--users", type=int, default=FULL_USERS, help="train users (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of concepts and prompts (default: 0)")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, in pixels (default: 64)")
    parser.add_argument("--released", type=Path, metavar="DIR", help="folder with the released labels (default: none)")
    args = parser.parse_args()
    counts = write_standin(args.out, args.users, args.seed, args.size, args.released)
    print(json.dumps({"out": str(args.out), "rows": counts}))


if __name__ == "__main__":
    main()
