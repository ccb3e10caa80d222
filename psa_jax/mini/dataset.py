"""SAGE-mini on disk: the small world with SAGE's layout, schema and label rule, for tests, demos and the tiny model.

The two pictures of a pair differ only in one pictogram; its two prompts are worded independently, as in SAGE. A fifth
of the pairs shows a second, benign pictogram, and in a fifth each prompt says that the other's pictogram is not there.

Users of test_unseen are many, with one pair for each category and one of a concept that no other split has; a fifth of
them bans a set of categories that nobody in the other splits bans.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from psa_jax.data.rows import SPLITS
from psa_jax.errors import PSAError
from psa_jax.files import replacing_folder, write_private
from psa_jax.mini.captions import NEGATED_SHARE, TWO_SHARE, Prompt, caption, rephrased, sample_prompt
from psa_jax.mini.world import BENIGN, CONCEPTS, HELD_OUT_CONCEPTS, Concept, render
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, UserProfile
from psa_jax.progress import Progress
from psa_jax.seeds import check_seed

CONCEPTS_PER_CATEGORY = 3
ROWS_PER_USER = len(CATEGORIES) * CONCEPTS_PER_CATEGORY * 2
"""Rows of each user of train, val and test_seen."""
UNSEEN_ROWS_PER_USER = (len(CATEGORIES) + 1) * 2
MOST_UNSEEN = 300
POPULATION_SEED = 2025
"""User ids mean the same people in every rendering: the seed never changes the population."""

HELD_OUT_BANS: tuple[tuple[str, ...], ...] = (
    ("Harassment", "Propaganda", "Sexuality", "Shocking", "Violence"),
    ("Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence"),
    ("Propaganda", "Sexuality", "Violence"),
    ("Self-Harm", "Shocking", "Violence"),
)
"""Sets of banned categories that no user of train, val and test_seen has: about a tenth of the population."""
_UNSEEN_BANS_SHARE = 5
"""One in so many users of test_unseen has one of these sets."""


def split_sizes(users: int) -> dict[str, int]:
    """Number of users of each split, in SAGE's proportions but for test_unseen; those of test_seen are in train, too.

    Args:
      users: number of train users.
    """
    others = max(8, users // 18)
    unseen = min(MOST_UNSEEN, max(8, 3 * users))
    return {"train": users, "val": others, "test_seen": min(users, others), "test_unseen": unseen}


def render_mini(out: Path, users: int, seed: int, *, paraphrase: bool = True) -> dict[str, int]:
    """Writes SAGE-mini in SAGE's layout: for each split, a folder with metadata.jsonl (mode 0600) and its pictures.

    The users are the first ones of the population that suit their split; concepts, scenes and captions are sampled
    from `seed`. The same arguments give the same bytes. The folder appears complete or not at all.

    Args:
      out: folder to make, absent or empty.
      users: number of train users.
      seed: a number from 0 to 2^32 − 1.
      paraphrase: word the two prompts of a pair independently; otherwise they differ in the pictogram alone.

    Returns:
      Rows of each split.

    Raises:
      PSAError: an argument is out of range or the folder cannot be written.
    """
    out = Path(out)
    if users < 1:
        raise PSAError(f"cannot make {users} users: give a number from 1 up")
    check_seed(seed)
    members = _members(users, seed)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PSAError(f"{out} exists and is not an empty folder: give a new folder or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(out) as whole:
            whole.mkdir(mode=0o700)
            with Progress(sum(map(len, members.values())), "user", "rendering SAGE-mini") as progress:
                counts = {}
                for split, profiles in members.items():
                    counts[split] = _write_split(whole / split, split, profiles, seed, paraphrase, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PSAError(f"cannot write {out}: {reason}; check the path, its permissions and space") from error
    return counts


def _members(users: int, seed: int) -> dict[str, list[UserProfile]]:
    """The users of each split."""
    sizes = split_sizes(users)
    known, new = sizes["train"] + sizes["val"] + sizes["test_unseen"], sizes["test_unseen"] // _UNSEEN_BANS_SHARE
    # About a tenth of the population has held-out bans; should so many not be there, the population grows.
    count = 2 * (known + 8 * new)
    population = sample_population(count, seed=POPULATION_SEED)
    unusual = [profile for profile in population if banned_categories(profile) in HELD_OUT_BANS][:new]
    usual = [profile for profile in population if banned_categories(profile) not in HELD_OUT_BANS]
    train, usual = usual[:users], usual[users:]
    seen = np.sort(np.random.default_rng([seed, len(SPLITS)]).choice(users, sizes["test_seen"], replace=False))
    unseen = usual[sizes["val"] :][: sizes["test_unseen"] - len(unusual)] + unusual
    return {
        "train": train,
        "val": usual[: sizes["val"]],
        "test_seen": [train[int(index)] for index in seen],
        "test_unseen": sorted(unseen, key=lambda profile: profile.user_id),
    }


def _write_split(
    folder: Path, split: str, profiles: Sequence[UserProfile], seed: int, paraphrase: bool, progress: Progress
) -> int:
    """Renders one split and returns its number of rows."""
    folder.mkdir(parents=True)
    rows: list[dict] = []
    for profile in profiles:
        rng = np.random.default_rng([seed, SPLITS.index(split), int(profile.user_id)])
        for concept in _concepts_of(split, rng):
            rows += _write_pair(folder, split, profile, concept, len(rows) // 2, paraphrase, rng)
        progress.step()
    write_private(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return len(rows)


def _concepts_of(split: str, rng: np.random.Generator) -> list[Concept]:
    """The concepts of one user's pairs: all known ones, or one of each category and one that is held out."""
    known = [concept for concept in CONCEPTS if concept.name not in HELD_OUT_CONCEPTS]
    if split != "test_unseen":
        return known
    held_out = [concept for concept in CONCEPTS if concept.name in HELD_OUT_CONCEPTS]
    groups = [[concept for concept in known if concept.category == category] for category in CATEGORIES]
    return [group[int(rng.integers(len(group)))] for group in (*groups, held_out)]


def _write_pair(
    folder: Path,
    split: str,
    profile: UserProfile,
    concept: Concept,
    index: int,
    paraphrase: bool,
    rng: np.random.Generator,
) -> list[dict]:
    """Saves the two pictures of a pair; returns its two rows, with the unsafe and with the safe prompt."""
    unsafe, safe = _prompts_of_pair(split, concept, paraphrase, rng)
    stem = f"user_{profile.user_id}_{concept.category.lower()}_{concept.name.replace(' ', '_')}_{index:05d}"
    safe_file, unsafe_file = f"{stem}_s.jpg", f"{stem}_u.jpg"
    for prompt, name in ((safe, safe_file), (unsafe, unsafe_file)):
        Image.fromarray(render(prompt.scene)).save(folder / name, quality=95, subsampling=0)
    banned = concept.category in banned_categories(profile)
    rows = []
    for prompt, kind in ((unsafe, "u"), (safe, "s")):
        wants_safe = kind == "s" or banned
        rows.append(
            {
                "file_name": f"{stem}.jpg_{kind}.jpg",
                "chosen": safe_file if wants_safe else unsafe_file,
                "rejected": unsafe_file if wants_safe else safe_file,
                "caption": caption(prompt),
                "user_data": _user_data(profile),
            }
        )
    return rows


def _prompts_of_pair(split: str, concept: Concept, paraphrase: bool, rng: np.random.Generator) -> tuple[Prompt, Prompt]:
    """The unsafe and the safe prompt, which differ in the pictogram and perhaps in the wording."""
    form = rng.random()
    if form < TWO_SHARE:
        others = [name for name in BENIGN if name != concept.benign]
        unsafe = sample_prompt(rng, split, concept.name, companion=others[int(rng.integers(len(others)))])
    elif form < TWO_SHARE + NEGATED_SHARE:
        unsafe = sample_prompt(rng, split, concept.name, absent=concept.benign)
    else:
        unsafe = sample_prompt(rng, split, concept.name)
    safe = unsafe._replace(
        scene=replace(unsafe.scene, pictogram=concept.benign), absent=concept.name if unsafe.absent else None
    )
    return unsafe, rephrased(rng, safe, split) if paraphrase else safe


def _user_data(profile: UserProfile) -> dict[str, str | int | None]:
    """SAGE's order: the cluster (there a leftover of an older clustering, here any fixed number) follows the id."""
    mapping = profile.to_mapping()
    return {"User_ID": mapping.pop("User_ID"), "Cluster_ID": str(int(profile.user_id) % 40), **mapping}
