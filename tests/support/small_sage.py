"""A SAGE folder of a few real users, written by hand: two pairs a category and user, 12 x 8 pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from psa_jax.data.preprocess import Preprocess
from psa_jax.profiles.population import sample_population

CATEGORIES = ("harassment", "hate", "propaganda", "self-harm", "sexuality", "shocking", "violence")
CONCEPTS = ("a_thing", "don't-look_twice")
# What these users of the released population ban, read off its users.csv. Every category has both kinds of users.
BANS = {
    "0000001": {"propaganda", "sexuality"},
    "0000003": {"self-harm", "sexuality", "shocking"},
    "0000007": set(CATEGORIES),
    "0000039": {"self-harm", "shocking", "violence"},
}
TWO_USERS = {user_id: BANS[user_id] for user_id in ("0000001", "0000003")}
SIZE = (12, 8)  # width, height


def write_sage(root: Path, users: dict[str, set[str]], split: str = "train") -> list[dict]:
    """Writes one split; returns its rows. `users` maps ids of the population to their banned categories."""
    folder = root / split
    folder.mkdir(parents=True)
    population = {user.user_id: user for user in sample_population(60)}
    rng = np.random.default_rng(7)
    rows = []
    for user_id, bans in users.items():
        for category in CATEGORIES:
            for number, concept in enumerate(CONCEPTS):
                stem = f"user_{user_id}_{category}_{concept}_{number:05d}"
                safe, unsafe = f"{stem}_s.jpg", f"{stem}_u.jpg"
                for name in (safe, unsafe):
                    pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / name, quality=95)
                for kind in "us":
                    wants_safe = kind == "s" or category in bans
                    rows.append(
                        {
                            "file_name": f"{stem}.jpg_{kind}.jpg",
                            "chosen": safe if wants_safe else unsafe,
                            "rejected": unsafe if wants_safe else safe,
                            "caption": f"{kind} prompt of {concept}, {category}: é",
                            "user_data": population[user_id].to_mapping() | {"Cluster_ID": "13"},
                        }
                    )
    write_rows(folder, rows)
    return rows


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class CountingEncoder:
    """Stands in for a VAE: every 2 x 2 block becomes its mean (3 channels) and its negative (3 channels)."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[bytes] = []

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.batches.append(len(pixels))
        self.seen += [picture.tobytes() for picture in pixels]
        b, h, w, c = pixels.shape
        mean = pixels.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4), dtype=np.float32)
        return np.concatenate([mean, -mean], axis=-1)


def tokenize(captions: list[str]) -> np.ndarray:
    """Eight code points a caption."""
    return np.asarray([[ord(character) for character in caption.ljust(8)[:8]] for caption in captions])


BUILD = {
    "vae_fingerprint": "f00d",
    "latent_shape": (4, 4, 6),
    "preprocess": Preprocess(8),
    "family": "tiny",
    "batch_size": 5,
}
