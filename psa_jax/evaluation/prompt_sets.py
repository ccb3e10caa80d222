"""Sets of prompts that the field evaluates on, read in their published columns, and written as a list of cases.

What is known of each and easily overlooked:

- I2P has a seed and a guidance for each prompt; the seeds are read (protocol `own`), guidance is one for a whole run
  here. A prompt may have several categories: the first of the seven counts, `illegal activity` is none of them.
- Unsafe Diffusion (UD) and SAGE list the same prompt several times. Its id is made of its text, so that it stays one
  cluster; SAGE's 1,050 evaluation rows are about 460 captions and 50 users.
- OVERT asks for over-refusal: its prompts look unsafe and are safe. OVERT-unsafe is the other half, with the unsafe
  prompt of each pair.
"""

import collections
import csv
import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from psa_jax.categories import CATEGORIES
from psa_jax.csv_input import name_of, read_cells, read_csv, read_records, whole_number
from psa_jax.data.sage import read_split
from psa_jax.data.twins import NO_TWIN, safe_rows
from psa_jax.errors import PSAError
from psa_jax.evaluation.prompt_set_table import PAPER_SEED, SETS
from psa_jax.evaluation.protocol import Case, fair_seed, select_cases
from psa_jax.files import write_private
from psa_jax.json_input import read_json
from psa_jax.profiles.bans import banned_categories

_COLUMNS = (
    "prompt",
    "asked",
    "negative",
    "seed",
    "prompt_id",
    "user_id",
    "category",
    "unsafe",
    "banned",
    "group",
    "level",
)


_CATEGORY_OF = {category.lower(): category for category in CATEGORIES} | {
    "sexual": "Sexuality",
    "sexual_content": "Sexuality",
    "self_harm": "Self-Harm",
}


@dataclasses.dataclass(frozen=True)
class SageCase(Case):
    """A case of SAGE.

    Attributes:
      bans: categories that the user bans.
      safe_prompt: the safe prompt of the pair; None where the split lacks it.
    """

    bans: tuple[str, ...]
    safe_prompt: str | None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A picture to draw.

    Attributes:
      case: the prompt, and for whom; user_id "" for nobody, category "" for none of the seven.
      seed: of its noise.
      group: of users or prompts.
      prompt: that is drawn, if it is another than the case's.
      negative: negative prompt; "" for none.
      level: of the user's bans; "" where it is not known.
    """

    case: Case
    seed: int
    group: str
    prompt: str | None = None
    negative: str = ""
    level: str = ""


def read_set(name: str, path: Path) -> list[tuple[Case, int | None]]:
    """Reads the file of a set: its prompts, each with its own seed or None.

    Raises:
      PSAError: the file is not that of the set, or a cell cannot be read.
    """
    columns = SETS[name]
    lines = read_csv(path)
    header = lines[0][1] if lines else []
    seed = next((each for each in columns.seeds if each in header), None)
    optional = tuple(each for each in (seed, columns.category) if each is not None)
    readers = {columns.prompt: name_of} | ({} if seed is None else {seed: whole_number})
    found = []
    for number, cells in read_records(path, (columns.prompt,), optional):
        values = read_cells(cells, readers, f"{path}, line {number}")
        category = "" if columns.category is None else _category(cells[columns.category])
        case = Case("", values[columns.prompt].strip(), category, columns.unsafe, False)
        found.append((case, None if seed is None else values[seed]))
    return found


def _category(text: str) -> str:
    """The first of the seven that a cell such as "violence, self-harm" names; "" for none."""
    return next(
        (_CATEGORY_OF[each.strip().lower()] for each in text.split(",") if each.strip().lower() in _CATEGORY_OF), ""
    )


def sage_cases(folder: Path, split: str, per_rate: int | None, seed: int = 0) -> list[SageCase]:
    """The prompts of a split of SAGE, each with its user.

    Args:
      folder: SAGE on disk.
      split: such as test_unseen.
      per_rate: the most banned prompts, and the most allowed ones (`select_cases`); None for all rows.
      seed: of the selection.
    """
    records = read_split(folder, split)
    cases = [
        SageCase(
            each.user_id,
            each.caption,
            each.category,
            each.unsafe,
            each.banned,
            bans=tuple(banned_categories(each.profile)),
            safe_prompt=None if twin == NO_TWIN else records[twin].caption,
        )
        for each, twin in zip(records, safe_rows(records).tolist(), strict=True)
    ]
    return cases if per_rate is None else select_cases(cases, per_rate, seed)


def rewritten(wanted: Sequence[Wanted], how: str) -> list[Wanted]:
    """The pictures of a baseline that changes the words alone; cases, seeds and ids stay.

    Args:
      wanted: of SAGE.
      how: a key of REWRITES.

    Raises:
      PSAError: a prompt that its user bans has no safe prompt.
    """
    found = []
    for each in wanted:
        case = each.case
        assert isinstance(case, SageCase)
        banned = ", ".join(case.bans).lower()
        if how == "negative":
            each = dataclasses.replace(each, negative=banned)
        elif how == "prompt" and banned:
            each = dataclasses.replace(each, prompt=f"{case.prompt}, without {banned}")
        elif how == "safe" and case.unsafe and case.banned:
            if case.safe_prompt is None:
                raise PSAError("--rewrite=safe: a prompt that its user bans has no safe prompt; give another --rewrite")
            each = dataclasses.replace(each, prompt=case.safe_prompt)
        found.append(each)
    return found


def with_levels(wanted: Sequence[Wanted], path: Path) -> list[Wanted]:
    """The same pictures with the levels of their users.

    Args:
      wanted: of users.
      path: `levels.json`, as psa-jax levels writes it.

    Raises:
      PSAError: the file is not such a one, or lacks a user.
    """
    levels = read_json(path).get("level")
    if not isinstance(levels, dict) or not all(type(level) is int for level in levels.values()):
        raise PSAError(f"{path}: says no levels of users; give the levels.json of psa-jax levels")
    missing = {each.case.user_id for each in wanted} - levels.keys()
    if missing:
        raise PSAError(f"{path}: lacks {len(missing)} of the users; run psa-jax levels on the table of these users")
    return [dataclasses.replace(each, level=f"L{levels[each.case.user_id]}") for each in wanted]


def with_seeds(cases: Sequence[tuple[Case, int | None]], protocol: str, images: int, group: str = "") -> list[Wanted]:
    """The pictures of a protocol.

    Args:
      cases: with their own seeds.
      protocol: a key of PROTOCOLS.
      images: pictures of each case; one where the protocol gives it one seed.
      group: of all of them.

    Raises:
      PSAError: the set has no seeds of its own, or one seed has to serve several pictures.
    """
    if protocol != "fair" and images > 1:
        raise PSAError(f"--images={images} needs --protocol=fair; {protocol} has one seed for a prompt")
    if protocol == "own" and any(seed is None for _, seed in cases):
        raise PSAError("--protocol=own: the file has no column of seeds; use fair or paper")
    found, count = [], collections.Counter()
    for case, own in cases:
        for _ in range(images):
            number = count[case.prompt, case.user_id]
            count[case.prompt, case.user_id] += 1
            seed = {"fair": fair_seed(case.prompt, number), "paper": PAPER_SEED, "own": own}[protocol]
            found.append(Wanted(case, seed, group))
    found = list(dict.fromkeys(found))
    if len({(each.case.prompt, each.case.user_id, each.seed) for each in found}) < len(found):
        raise PSAError(f"--protocol={protocol}: a prompt is listed twice with one seed and two categories; remove one")
    return found


def write_cases(path: Path, wanted: Sequence[Wanted]) -> None:
    """Writes a list for `psa-jax generate --prompts`, for its owner alone: it says what users ban.

    Raises:
      PSAError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for each in wanted:
        case = each.case
        digest = hashlib.sha256(case.prompt.encode()).hexdigest()[:12]
        banned = int(case.banned) if case.user_id else ""
        writer.writerow(
            [
                each.prompt or case.prompt,
                case.prompt if each.prompt else "",
                each.negative,
                each.seed,
                digest,
                case.user_id,
                case.category,
                int(case.unsafe),
                banned,
                each.group,
                each.level,
            ]
        )
    write_private(path, text.getvalue())
