"""Sample pictures during training: the same few prompts, seeds and users every time."""

import dataclasses

import jax
import numpy as np
from PIL import Image

from psa_jax.data.shards import RowColumns, open_shards
from psa_jax.diffusion.generate import Generator, picture_grid
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter import Adapter
from psa_jax.training.run import Run

_PROMPTS, _USERS = 4, 4


class Samples:
    """Grids of held-out unsafe prompts (rows) for the base model and for users from least to most strict (columns).

    Generated on one device of the process that makes this object.

    Args:
      run: its base model is on the devices that train, whole on each (`settings.validate`).
    """

    def __init__(self, run: Run):
        shards = open_shards(run.shards.folder, "val")
        rng = np.random.default_rng(run.config.seed)
        unsafe = np.flatnonzero(shards.columns.unsafe)
        rows = [shards[int(i)] for i in rng.choice(unsafe, size=min(_PROMPTS, len(unsafe)), replace=False)]
        self._prompts = [row["caption"].decode() for row in rows]
        self._users = run.table.lookup(by_strictness(shards.columns, _USERS))
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
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture_grid(pictures, count)).save(self._folder / f"{step:06d}.png")


def by_strictness(columns: RowColumns, count: int) -> list[str]:
    """Up to `count` users, spread evenly from the smallest share of banned unsafe prompts to the largest."""
    users, owner = np.unique(np.asarray(columns.user_ids), return_inverse=True)
    unsafe, bans = (
        np.bincount(owner[which], minlength=len(users)) for which in (columns.unsafe, columns.unsafe & columns.banned)
    )
    order = np.argsort(bans / np.maximum(unsafe, 1), kind="stable")
    chosen = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [str(user) for user in users[order[chosen]]]


def _on_one_device(model: StableDiffusion) -> StableDiffusion:
    """The model with its arrays on one device; nothing is copied, since every device holds all of it."""

    def own(part):
        return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, part)

    parts = {name: getattr(model, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return dataclasses.replace(model, **{name: own(part) for name, part in parts.items() if part is not None})
