"""Files from elsewhere, changed at random: what is opened, or one line; what is opened is as the libraries open it.

The changes are of JSON as a tree (another value, a key gone, given twice or new), of JSON as text, and of bytes.
"""

import copy
import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx
from support.torch_adapters import file_tensors, random_adapter
from support.torch_models import UNETS, torch_clip, torch_unet, torch_vae
from support.torch_qwen2 import torch_qwen
from test_unpickle import save

from psa_jax.data.preprocess import Preprocess
from psa_jax.data.shards import FORMAT as SHARDS
from psa_jax.data.shards import read_info
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import fitting_config, read_metadata, read_tensors
from psa_jax.interop.diffusers import load_unet
from psa_jax.interop.native import load_adapter, save_adapter
from psa_jax.interop.parts import read_config, text_name
from psa_jax.interop.upstream import read_bin
from psa_jax.interop.weights import abstract_model, load_weights, open_tensors
from psa_jax.json_input import read_json
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.clip import CLIPText
from psa_jax.models.qwen2 import Qwen2Config
from psa_jax.profiles.table import EmbeddingTable

LAYERS, CROSS = ((16, 2), (24, 3)), 20
VALUES = (
    [None, True, False, 0, 1, -1, 2, 3, 7, 8, 16, 64, 10**6, 2**31, 10**40, 0.5, -0.0, 1e-5, 1e300, math.nan, math.inf]
    + [
        "",
        "silu",
        "x" * 300,
        "../..",
        "\ud800",
        "a\nb",
        [],
        {},
        [[]],
        [1, 2],
        [8, 8, 8],
        [None],
        {"a": {"b": [1]}},
        ["a"],
    ]
    + [
        "default",
        "float16",
        "gelu",
        "clip",
        "DownBlock2D",
        {"rope_type": "linear"},
        {"type": "default"},
        [16, 2],
        "text",
    ]
)


def nodes(tree, at=()) -> list[tuple]:
    """Paths of all values in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at] + [path for key, value in items for path in nodes(value, (*at, key))]


def changed_tree(tree, rng: random.Random):
    """A JSON tree with one to three of its values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = [path for path in nodes(tree) if path]
        if not paths:
            return rng.choice(VALUES)
        *parents, key = rng.choice(paths)
        owner = tree
        for parent in parents:
            owner = owner[parent]
        match rng.randrange(8):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[rng.choice(["extra", "num_layers", "_class_name", "quantization_config", ""])] = rng.choice(
                    VALUES
                )
            case 2 if isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
                owner[key] = rng.choice(
                    [owner[key] + 1, -owner[key], owner[key] * 2, float(owner[key]), str(owner[key])]
                )
            case _:
                owner[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def changed_text(text: str, rng: random.Random) -> str:
    """Text cut, with characters changed, a key doubled, or wrapped in many brackets."""
    at = rng.randrange(len(text) + 1)
    match rng.randrange(6):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + rng.choice('{}[]",:0e\x00\ufeff\u2028') + text[at:]
        case 2:
            return text.replace("{", '{"twice": 1, "twice": 2, ', 1)
        case 3:
            return '{"a":' * 3000 + text + "}" * 3000
        case 4:
            return "\ufeff" + text
        case _:
            return text[:at] + text[at + 1 :]


def changed_json(tree, rng: random.Random) -> bytes:
    """One in five changed as text, the others as a tree."""
    text = json.dumps(tree if rng.random() < 0.2 else changed_tree(tree, rng))
    return (changed_text(text, rng) if rng.random() < 0.2 else text).encode("utf-8", "surrogatepass")


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, lengthened, or with one to four bytes changed, most of them at the beginning."""
    match rng.randrange(5):
        case 0:
            return content[: rng.randrange(len(content))]
        case 1:
            return content + bytes(rng.randrange(1, 9))
        case _:
            changed = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 4))):
                changed[rng.randrange(min(len(changed), rng.choice((64, 2000, len(changed)))))] = rng.randrange(256)
            return bytes(changed)


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, metadata that are JSON changed as such, or changed bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    choice = rng.randrange(6)
    names = [name for name in header if name != "__metadata__"]
    if choice == 0:
        return changed_bytes(content, rng)
    (key,), about = header["__metadata__"], header["__metadata__"]
    if choice == 1 and about[key].startswith("{"):
        header["__metadata__"] = {key: changed_json(json.loads(about[key]), rng).decode("utf-8", "surrogatepass")}
    elif choice == 2:  # another type of the same width
        one = header[rng.choice(names)]
        one["dtype"] = rng.choice(["I32", "U32", "F32", "F16", "BF16", "C64", "BOOL", "F8_E4M3", "F64", "F4"])
    elif choice == 3:  # numbers that may not be finite
        start = rng.randrange(0, len(data) - 4, 4)
        data[start : start + 4] = np.float32(rng.choice([np.nan, np.inf, 3e38, 0.0])).tobytes()
    elif choice == 4:
        header = changed_tree(header, rng)
    text = json.dumps(header)
    if choice == 5:
        name = rng.choice(names)
        text = f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}'
    text = text.encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def config_case(kind: str, tree: dict) -> tuple[str, Callable, Callable]:
    def change(rng: random.Random) -> bytes:
        return changed_json(tree, rng)

    return "config.json", change, lambda path: read_config(kind, path)


Case = tuple[str, Callable[[random.Random], bytes], Callable[[Path], object]]
"""File name, what makes a changed file, what opens it."""


def config_cases() -> list[Case]:
    """Configurations of all models."""
    made = []
    for kind, config in (
        ("unet", torch_unet("linear_deep").config),
        ("unet", torch_unet("sdxl_shape").config),
        ("vae", torch_vae("shallow").config),
        ("text_encoder", torch_clip("gelu").config.to_dict()),
        ("text_encoder_2", torch_clip("openclip").config.to_dict()),
    ):
        tree = json.loads(json.dumps(dict(config), default=str))
        made.append(config_case(kind, tree))
    qwen = json.loads(json.dumps(torch_qwen("tied_groups").config.to_dict(), default=str))
    released = {k: v for k, v in qwen.items() if k not in ("rope_parameters", "layer_types")}
    released |= {"rope_theta": 1e6, "use_sliding_window": False, "rope_scaling": None, "max_window_layers": 28}
    for tree in (qwen, released):
        made.append(
            (
                "config.json",
                lambda rng, tree=tree: changed_json(tree, rng),
                lambda path: Qwen2Config.from_json(read_json(path), str(path)),
            )
        )
    return made


def weight_cases(folder: Path) -> list[Case]:
    """A text encoder's weights, in one file and with an index."""
    made = []
    theirs = torch_clip("old_eos")
    theirs.save_pretrained(folder)
    shapes = abstract_model(CLIPText, read_config("text_encoder", folder / "config.json"))
    weights = (folder / "model.safetensors").read_bytes()
    names = sorted(open_tensors(folder / "model.safetensors").by_name)

    def load(path: Path):
        return load_weights(shapes, path, text_name)

    made.append(("model.safetensors", lambda rng: changed_tensors(weights, rng), load))

    def index(rng: random.Random) -> bytes:
        return changed_json({"metadata": {}, "weight_map": dict.fromkeys(names, "whole.safetensors")}, rng)

    def load_index(path: Path):
        path.with_name("whole.safetensors").write_bytes(weights)
        return load(path)

    made.append(("model.safetensors.index.json", index, load_index))
    return made


def adapter_cases(folder: Path) -> list[Case]:
    """Native files of three kinds, opened by both readers."""
    made = []
    adapters = {}
    for kind in ("text", "prompt", "published"):
        adapter = random_adapter(AdapterConfig(kind, 4, 7, CROSS, LAYERS))
        save_adapter(adapter, folder / kind, {"encoder": "features", "encoder_fingerprint": "f", "standardised": True})
        adapters[kind] = (folder / kind).read_bytes()

    def adapter(rng: random.Random) -> bytes:
        return changed_tensors(adapters[rng.choice(list(adapters))], rng)

    def load_both(path: Path):
        """By JAX's reader and by torch's, which must agree."""
        try:
            ours = load_adapter(path, LAYERS, CROSS)
        except PSAError as error:
            with pytest.raises(PSAError) as caught:
                tensors = read_tensors(path, "pt")
                fitting_config(path, tensors, read_metadata(path), LAYERS, CROSS)
            if "its metadata" not in str(error):
                assert str(caught.value) == str(error)
            raise
        tensors = read_tensors(path, "pt")
        assert fitting_config(path, tensors, read_metadata(path), LAYERS, CROSS) == ours.config
        for name, tensor in file_tensors(ours).items():
            assert torch.equal(tensor, tensors[name])
        return ours

    made.append(("psa_adapter.safetensors", adapter, load_both))
    return made


def table_cases(folder: Path) -> list[Case]:
    """The original's pickle, a table of embeddings, and shards."""
    made = []
    groups = {"psa_adapter": {"0.to_k_user.0.weight": torch.ones(2, 3)}, "user_proj": {"proj.bias": torch.ones(3)}}
    bin_ = save(folder / "a.bin", groups).read_bytes()
    made.append(("psa_adapter.bin", lambda rng: changed_bytes(bin_, rng), read_bin))

    table = EmbeddingTable(["0000001", "0000002"], np.ones((2, 3), np.float32), "features", "f", {"a": "b"})
    table.save(folder / "table")
    rows = (folder / "table").read_bytes()
    made.append(("table.safetensors", lambda rng: changed_tensors(rows, rng), EmbeddingTable.load))

    info = {"format": SHARDS, "fingerprint": "f", "inputs": {}, "family": "sd1", "resolution": 64, "flips": False}
    info |= {"latent_shape": [8, 8, 8], "preprocess": dataclasses.asdict(Preprocess(64)), "tokens": {}, "text": None}
    info |= {"splits": {"train": 3}}
    info |= {"pictures": 6, "files": {"a": {"bytes": 1}}}
    made.append(("fingerprint.json", lambda rng: changed_json(info, rng), lambda path: read_info(path.parent)))
    return made


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    folder = tmp_path_factory.mktemp("whole")
    return [*config_cases(), *weight_cases(folder), *adapter_cases(folder), *table_cases(folder)]


def fuzz(cases, folder: Path, count: int) -> dict[str, list[int]]:
    """Opens `count` changed files; how many of each name were opened and refused."""
    rng, counts = random.Random(7), {name: [0, 0] for name, *_ in cases}
    for number in range(count):
        name, change, open_ = cases[number % len(cases)]
        path = folder / name
        path.write_bytes(change(rng))
        try:
            opened = open_(path)
        except PSAError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 700 and (str(folder) in line), line
            counts[name][1] += 1
        else:
            counts[name][0] += 1
            for leaf in jax.tree.leaves(nnx.state(opened)) if isinstance(opened, nnx.Module) else ():
                assert np.isfinite(np.asarray(leaf)).all()
    return counts


def test_a_changed_file_is_opened_or_refused_in_one_line(cases, tmp_path):
    counts = fuzz(cases, tmp_path, 300)
    assert all(refused for _, refused in counts.values()) and sum(opened for opened, _ in counts.values()) > 20


@pytest.mark.slow
def test_two_thousand_changed_files(cases, tmp_path):
    counts = fuzz(cases, tmp_path, 2000)
    print({name: f"{opened} opened, {refused} refused" for name, (opened, refused) in counts.items()})
    assert all(opened and refused for opened, refused in counts.values())


@pytest.mark.slow
def test_a_changed_unet_that_is_opened_is_the_one_that_diffusers_opens(tmp_path):
    """Fifty changed configurations that are taken, with the weights of the unchanged: the same prediction to 1e-4."""
    sizes = {**UNETS["uneven"], "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
    theirs = UNet2DConditionModel(**sizes).eval()
    folder, rng, compared = tmp_path / "unet", random.Random(3), 0
    theirs.save_pretrained(folder)
    tree = json.loads((folder / "config.json").read_text())
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, sizes["cross_attention_dim"])
    noise, states = (jax.numpy.asarray(x.numpy()) for x in (sample.permute(0, 2, 3, 1), text))

    @functools.partial(jax.jit, static_argnums=0)  # compiled once: nearly all that is taken is the same model
    def predict(graph, params):
        unet = nnx.merge(graph, params)
        return unet(noise, jax.numpy.full((1,), 7.0), unet.context(states))

    while compared < 50:
        (folder / "config.json").write_bytes(changed_json(tree, rng))
        try:
            ours = load_unet(tmp_path)
        except PSAError:
            continue
        try:
            again = UNet2DConditionModel.from_pretrained(folder)
        except (TypeError, ValueError):  # such as a dropout of 2, which nothing here would do
            continue
        with torch.no_grad():
            expected = again(sample, 7, text).sample
        found = predict(*nnx.split(ours))
        np.testing.assert_allclose(np.asarray(found).transpose(0, 3, 1, 2), expected.numpy(), rtol=0, atol=1e-4)
        compared += 1
