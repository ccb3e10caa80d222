"""Sample pictures during training: the same few prompts, seeds and users every time."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from psa_jax.categories import CATEGORIES
from psa_jax.data.rows import NO_CATEGORY
from psa_jax.data.shards import RowColumns, open_shards
from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.picture_sheet import picture_sheet
from psa_jax.files import PRIVATE, replacing
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter import Adapter
from psa_jax.training.run import Run

_PROMPTS, _USERS = 4, 4


class Samples:
    """Grids of held-out unsafe prompts (rows) for the base model and for users from least to most strict (columns).

    A grid says the step, each prompt with its category, and whether the user of a column bans it, but not who that is.
    Bans are personal data nevertheless: the grids are readable by their owner alone, and no logger gets them.
    Generated on one device of the process that makes this object.

    Args:
      run: its base model is on the devices that train, whole on each (`settings.validate`).
    """

    def __init__(self, run: Run):
        shards = open_shards(run.shards.folder, "val")
        rng = np.random.default_rng(run.config.seed)
        unsafe = np.flatnonzero(shards.columns.unsafe)
        chosen = rng.choice(unsafe, size=min(_PROMPTS, len(unsafe)), replace=False)
        self._prompts = [shards[int(i)]["caption"].decode() for i in chosen]
        users, categories = by_strictness(shards.columns, _USERS), np.asarray(shards.columns.categories)[chosen]
        self._users = run.table.lookup(users)
        self._columns = ["base model", *headings(len(users))]
        self._rows = [
            prompt if category == NO_CATEGORY else f"{prompt} ({CATEGORIES[category]})"
            for prompt, category in zip(self._prompts, categories, strict=True)
        ]
        self._banned = [[None, *row] for row in bans_of(shards.columns, users, categories)]
        self._model, self._folder = _on_one_device(run.setup.model), run.workdir / "samples"
        self._generator = None

    def draw(self, adapter: Adapter, step: int) -> None:
        """Writes `samples/<step>.png`."""
        count = len(self._users) + 1
        prompts = [prompt for prompt in self._prompts for _ in range(count)]
        seeds = [i for i in range(len(self._prompts)) for _ in range(count)]
        users = np.concatenate([np.zeros_like(self._users[:1]), self._users])
        scales = np.float32([0.0] + [1.0] * len(self._users))
        if self._generator is None:
            self._generator = Generator(self._model, adapter, batch_size=len(prompts))
        pictures = self._generator.with_adapter(adapter)(
            prompts, seeds, np.tile(users, (len(self._prompts), 1)), scale=np.tile(scales, len(self._prompts))
        )
        sheet = picture_sheet(
            pictures, self._columns, self._rows, self._banned, f"step {step:,}", "no user, or not known"
        )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self._folder / f"{step:06d}.png", PRIVATE) as file:
            sheet.save(file, format="PNG")


def by_strictness(columns: RowColumns, count: int) -> list[str]:
    """Up to `count` users, spread evenly from the smallest share of banned unsafe prompts to the largest."""
    users, owner = np.unique(np.asarray(columns.user_ids), return_inverse=True)
    unsafe, bans = (
        np.bincount(owner[which], minlength=len(users)) for which in (columns.unsafe, columns.unsafe & columns.banned)
    )
    order = np.argsort(bans / np.maximum(unsafe, 1), kind="stable")
    chosen = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [str(user) for user in users[order[chosen]]]


def headings(count: int) -> list[str]:
    """Names of so many users from the least to the most strict, who stay anonymous."""
    ends = {1: " (bans least)", count: " (bans most)"} if count > 1 else {}
    return [f"user {number}{ends.get(number, '')}" for number in range(1, count + 1)]


def bans_of(columns: RowColumns, users: list[str], categories: Int[np.ndarray, " n"]) -> list[list[bool | None]]:
    """[category][user]: whether the user bans the category; None where no row of theirs tells, or for no category."""
    rows = zip(columns.user_ids, np.asarray(columns.categories), columns.unsafe, columns.banned, strict=True)
    known = {
        (str(user), int(category)): bool(banned)
        for user, category, unsafe, banned in rows
        if unsafe and category != NO_CATEGORY  # a ban of one such prompt says nothing of another
    }
    return [[known.get((user, int(category))) for user in users] for category in categories]


def _on_one_device(model: StableDiffusion) -> StableDiffusion:
    """The model with its arrays on one device; nothing is copied, since every device holds all of it."""

    def own(part):
        return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, part)

    parts = {name: getattr(model, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return dataclasses.replace(model, **{name: own(part) for name, part in parts.items() if part is not None})
