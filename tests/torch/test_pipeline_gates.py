"""Users by what they ban: the server needs seven numbers, and refuses what are not seven numbers from 0 to 1."""

import json

import numpy as np
import pytest
import torch
from support.torch_runtime import CALL, IDS, PROMPTS, difference, draw, latents

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.profiles import gate_program
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, COLUMNS
from psa_jax.torch import load_adapter, load_psa

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def psa(pipe, files, table):
    return load_psa(pipe, files["gates"], table=table)


def test_what_a_device_computes_draws_what_the_embedding_draws(psa, files, table, tmp_path):
    """The whole way: the exported program on the device, its numbers to the server, the same pictures."""
    assert main(["export", str(files["gates"]), "--format=gates", f"--out={tmp_path / 'out'}"]) == 0
    gates = gate_program.read_gates(tmp_path / "out" / "gates.npz")
    users = {user.user_id: user for user in sample_population(8)}
    found = []
    for number in IDS:
        profile = {n: getattr(users[number], n) for n in COLUMNS if n not in ("user_id", "age_group")}
        found.append(gate_program.bans(gates, profile))
    expected = draw(psa, user=IDS)
    by_array = draw(psa, gates=np.asarray([list(one.values()) for one in found], np.float32))
    assert difference(by_array, expected) <= 1e-4
    alone = draw(psa, rows=slice(0, 1), gates=json.loads(json.dumps(found[0])))  # as JSON brings it
    assert difference(alone, expected[:1]) <= 1e-4
    everything = draw(psa, gates=[1.0] * 7)
    assert difference(everything, expected) > 0.001
    nothing = draw(psa, gates=[0.0] * 7)
    base = draw(psa, user=None, allow_unprotected=True)
    assert difference(nothing, base) == 0


def test_stock_diffusers_takes_the_edited_prompt(pipe, files, psa):
    """Three lines without the runtime."""
    expected = draw(psa, gates=np.eye(7, dtype=np.float32)[:2])
    psa.unload()
    adapter, _ = load_adapter(files["gates"])
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    embeds = adapter.edit(embeds, torch.eye(7)[:2], torch.ones(2))
    stock = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, latents=latents(), **CALL).images
    assert difference(stock, expected) <= 1e-5


BAD = {
    "nan": ([float("nan")] + [0.0] * 6, "from 0 to 1; one is outside or NaN"),
    "above": ([1.5] + [0.0] * 6, "from 0 to 1; one is outside or NaN"),
    "below": ([-0.1] + [0.0] * 6, "from 0 to 1; one is outside or NaN"),
    "six": ([0.0] * 6, r"gates have shape \(1, 6\); give \[n, 7\]"),
    "text": (np.asarray(["yes"] * 7), "gates must be numbers from 0 to 1, 7 for each user"),
    "none at all": ([], "gates have shape"),
    "a category that does not exist": (dict.fromkeys(CATEGORIES, 0.0) | {"Politics": 1.0}, "a number for each of"),
    "a category left out": ({"Hate": 1.0}, "a number for each of"),
    "three users for two prompts": (np.zeros((3, 7), np.float32), "3 users for 2 prompts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_gates_draw_nothing(psa, name):
    gates, says = BAD[name]
    with pytest.raises(PSAError, match=says):
        draw(psa, gates=gates)


def test_gates_need_their_gate_and_no_user_beside_them(pipe, files, table):
    psa = load_psa(pipe, files["text"], table=table)
    with pytest.raises(PSAError, match="needs an adapter with the gate by categories"):
        draw(psa, gates=[0.0] * 7)
    psa.unload()
    psa = load_psa(pipe, files["gates"], table=table)
    with pytest.raises(PSAError, match="either user=... or gates=..., not both"):
        draw(psa, user=IDS, gates=[0.0] * 7)
