"""`psa-jax bench`: speed against the torch original on this machine. The last line on stdout is JSON."""

import functools
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from psa_jax.data.build import build_shards
from psa_jax.data.pipeline import make_pipeline
from psa_jax.data.preprocess import Preprocess
from psa_jax.data.sage import read_split
from psa_jax.data.shards import Shards, open_shards
from psa_jax.files import check_new, write
from psa_jax.mini.dataset import render_mini
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import print_stage
from psa_jax.tools import bench_generate, bench_step, bench_users
from psa_jax.tools.turns import Load, spread, take_turns

_TURNS = 8
_TOKENS = 77


def run(args: Namespace) -> int:
    """Runs the benchmark `args.what`."""
    if args.json is not None:
        check_new(args.json)  # before minutes of measuring
    generate = bench_generate.run if args.users is None else bench_users.run
    return {"input": input_, "step": bench_step.run, "generate": generate}[args.what](args)


def input_(args: Namespace) -> int:
    """Measures pairs per second of the input pipeline, and of decoding JPEG pairs as the torch original does."""
    args.resolution, load = args.resolution or 512, Load()
    print_stage("making small shards and JPEGs", f"then {2 * args.seconds:g} s of measuring")
    with tempfile.TemporaryDirectory() as folder:
        shards, table, pairs = _input_data(Path(folder), args)
        batches = iter(
            make_pipeline(shards, table, batch_size=args.batch_size, seed=0, balance="none", read_threads=args.threads)
        )
        with ThreadPoolExecutor(args.threads) as pool:

            def original() -> None:
                _stacked(list(pool.map(lambda pair: _decoded(pair, args.resolution), _some(pairs, args.batch_size))))

            turns = _rates({"ours": lambda: next(batches), "original": original}, args.seconds, args.batch_size)
        batches.close()
    result = {}
    for name in ("ours", "original"):
        result |= spread(f"{name}_pairs_per_second", [turn[name] for turn in turns], 1)
    result |= spread("ratio", [turn["ours"] / turn["original"] for turn in turns], 2)
    settings = ("resolution", "picture_size", "batch_size", "threads", "seconds")
    result |= {name: getattr(args, name) for name in settings} | load.summary()
    if args.json is not None:
        write(args.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def _rates(ways: dict[str, Callable[[], object]], seconds: float, batch_size: int) -> list[dict[str, float]]:
    """Pairs per second of each implementation in each turn, `seconds` in all for each, after one warm-up call."""

    def rate(step: Callable[[], object]) -> float:
        start, pairs = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds / _TURNS:
            step()
            pairs += batch_size
        return pairs / spent

    for step in ways.values():
        step()
    return take_turns({name: functools.partial(rate, step) for name, step in ways.items()}, _TURNS)


# --- the torch original: every step decodes, resizes, crops and normalises both pictures


def _decoded(pair: tuple[Path, Path], resolution: int) -> np.ndarray:
    """Decodes a pair like torchvision's Resize, CenterCrop, ToTensor, Normalize: [2, 3, r, r] float32 in [-1, 1]."""
    return np.stack([_normalised(path, resolution) for path in pair])


def _normalised(path: Path, side: int) -> np.ndarray:
    with Image.open(path) as image:
        image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return (pixels.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5


def _stacked(pairs: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(pairs, axis=1))


def _some(pairs: Iterator[tuple[Path, Path]], count: int) -> list[tuple[Path, Path]]:
    return [next(pairs) for _ in range(count)]


# --- data


def _input_data(folder: Path, args: Namespace) -> tuple[Shards, EmbeddingTable, Iterator[tuple[Path, Path]]]:
    """Makes shards and JPEGs of the real size from a small SAGE-mini; yields JPEG pairs in random order, forever."""
    render_mini(folder / "sage", 8, 0)
    side = args.resolution // 8
    rng = np.random.default_rng(0)
    build_shards(
        folder / "sage",
        folder / "shards",
        encode=lambda pixels: rng.normal(size=(len(pixels), side, side, 8)).astype(np.float32),
        vae_fingerprint="none: random moments",
        latent_shape=(side, side, 8),
        tokenizer=lambda captions: rng.integers(0, 49408, (len(captions), _TOKENS)),
        preprocess=Preprocess(64),
        family="bench",
        splits=("train",),
    )
    records = read_split(folder / "sage", "train")
    profiles = {record.user_id: record.profile for record in records}
    table = EmbeddingTable.from_profiles([profiles[user] for user in sorted(profiles)], get_encoder("features"))
    names = [(record.chosen, record.rejected) for record in records[:64]]
    for name in {name for pair in names for name in pair}:
        _write_large(folder / "sage" / "train" / name, args.picture_size, rng)

    def pairs() -> Iterator[tuple[Path, Path]]:
        while True:
            for number in rng.permutation(len(names)):
                chosen, rejected = names[number]
                yield folder / "sage" / "train" / chosen, folder / "sage" / "train" / rejected

    return open_shards(folder / "shards", "train"), table, pairs()


def _write_large(path: Path, side: int, rng: np.random.Generator) -> None:
    """Scales a picture up and adds grain, so that its JPEG is about as large as that of a photograph."""
    with Image.open(path) as image:
        large = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32)
    grain = rng.normal(scale=6.0, size=(side, side, 1)).astype(np.float32)
    Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)
