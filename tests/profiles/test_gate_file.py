"""The gate file: what it computes on a device with numpy alone is what the adapter computes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_adapters import random_adapter

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import read_metadata, read_tensors
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles import gate_program
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.gate_file import write_gates
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, COLUMNS, UserProfile

ENCODER = FeatureEncoder()
ABOUT = {"encoder": ENCODER.name, "encoder_fingerprint": ENCODER.fingerprint, "standardised": False, "family": "sd1"}
CONFIG = AdapterConfig("edit", 0, ENCODER.dim, 20, ((16, 2),), gate="categories")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The adapter, its file, and the folder of the gate file."""
    folder, adapter = tmp_path_factory.mktemp("gates"), random_adapter(CONFIG, seed=4)
    save_adapter(adapter, folder / "a.safetensors", ABOUT)
    assert main(["export", str(folder / "a.safetensors"), "--format=gates", f"--out={folder / 'out'}"]) == 0
    return adapter, folder / "a.safetensors", folder / "out"


def profile_of(user) -> dict:
    return {name: getattr(user, name) for name in COLUMNS if name not in ("user_id", "age_group")}


def test_numbers_are_those_of_the_adapter(exported):
    adapter, _, out = exported
    users, gates = sample_population(40), gate_program.read_gates(out / "gates.npz")
    expected = np.asarray(jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(ENCODER.encode(users)))))
    assert expected.std() > 0.05
    for user, wanted in zip(users, expected, strict=True):
        found = gate_program.bans(gates, profile_of(user))
        assert list(found) == list(CATEGORIES)
        np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=1e-5)
        bits = gate_program.bans(gates, profile_of(user), bits=True)
        assert list(bits.values()) == [float(value > 0.5) for value in wanted]


def test_bans_of_ones_own_count_on_the_device(exported):
    adapter, _, out = exported
    gates, profile = gate_program.read_gates(out / "gates.npz"), {"age": 30, "gender": "male", "bans": ["Hate"]}
    encoded = ENCODER.encode([UserProfile.from_mapping(profile)])
    wanted = np.asarray(jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(encoded))))[0]
    sure = list(CATEGORIES)[int(wanted.argmax())]
    profile |= {"bans": [sure]}
    assert wanted.max() > 0.6 > 0.4 > wanted.min()
    encoded = ENCODER.encode([UserProfile.from_mapping(profile)])
    wanted = np.asarray(jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(encoded))))[0]
    np.testing.assert_allclose(list(gate_program.bans(gates, profile).values()), wanted, rtol=0, atol=1e-5)
    assert gate_program.bans(gates, profile) != gate_program.bans(gates, profile | {"bans": []})
    with pytest.raises(ValueError, match="does not act on every ban"):
        gate_program.bans(gates, profile | {"bans": [list(CATEGORIES)[int(wanted.argmin())]]})
    for bans in ("Hate", ["hate"]):
        with pytest.raises(ValueError, match="bans must be a list"):
            gate_program.bans(gates, profile | {"bans": bans})
    with pytest.raises(ValueError, match="no place for bans of one's own"):
        fields = np.asarray([field for field in gates["fields"] if not str(field).startswith("bans=")])
        gate_program.features(gates | {"fields": fields}, profile)


@pytest.mark.parametrize("logit", [-1e4, -800.0, -30.0, 0.0, 30.0, 1e4])
def test_a_gate_that_is_very_sure(logit):
    weights = {"0.weight": np.zeros((2, 3)), "0.bias": np.zeros(2), "2.weight": np.zeros((7, 2))}
    found = gate_program.answers(weights | {"2.bias": np.full(7, logit)}, np.ones(3))
    np.testing.assert_allclose(found, jax.nn.sigmoid(jnp.full(7, logit)), rtol=1e-6, atol=1e-37)


def test_the_folder_works_with_numpy_alone(exported, tmp_path):
    """In a Python that can import neither psa_jax nor JAX nor torch; it holds no more than the user half."""
    adapter, _, out = exported
    blocked = "import sys\nfor name in ('psa_jax', 'jax', 'torch', 'safetensors'):\n    sys.modules[name] = None\n"
    code = f"{blocked}sys.argv = ['psa_gates.py', {json.dumps(json.dumps({'age': 9, 'gender': 'female'}))}]\n"
    code += f"import runpy\nrunpy.run_path({str(out / 'psa_gates.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout).keys() == set(CATEGORIES)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "gates.npz", "psa_gates.py"]
    with np.load(out / "gates.npz", allow_pickle=False) as file:
        weights = {name for name in file.files if name[0].isdigit()}
    assert weights == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (out / "gates.npz").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"gender": "female"}, "age must be a whole number from 0 to 100"),
        ({"age": 101, "gender": "female"}, "age must be a whole number from 0 to 100"),
        ({"age": True, "gender": "female"}, "age must be a whole number"),
        ({"age": 9}, "a profile has age and gender, religion"),
        ({"age": 9, "gender": "female", "shoe": 3}, "a profile has age and gender"),
        ({"age": 9, "gender": "girl"}, "gender must be one of male, female"),
    ],
)
def test_bad_profiles(exported, profile, says):
    with pytest.raises(ValueError, match=says):
        gate_program.bans(gate_program.read_gates(exported[2] / "gates.npz"), profile)


@pytest.mark.parametrize(
    ("config", "about", "says"),
    [
        (AdapterConfig("edit", 2, ENCODER.dim, 20, ((16, 2),)), ABOUT, "the edit adapter has no gate by categories"),
        (CONFIG, ABOUT | {"encoder": "qwen"}, "encoder 'qwen', which a device cannot run"),
        (CONFIG, ABOUT | {"encoder_fingerprint": "other"}, "which a device cannot run"),
        (CONFIG, ABOUT | {"standardised": True}, "trained on a standardised table"),
    ],
)
def test_adapters_that_have_no_gate_file(tmp_path, config, about, says):
    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(config), path, about)
    with pytest.raises(PSAError, match=says):
        write_gates(read_tensors(path), config, read_metadata(path), tmp_path, path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_gate_whose_tensors_are_missing_is_one_line(tmp_path, exported):
    from safetensors.numpy import load_file, save_file

    _, path, _ = exported
    tensors = load_file(path)
    metadata = {"psa": json.dumps(read_metadata(path) | {"format": "psa_jax.adapter/1"})}
    for lacking, says in (
        ("user_gate.0.weight", "user_gate.0.weight is missing"),
        ("prompt_gate.2.bias", "missing tensor prompt_gate.2.bias"),
    ):
        save_file({name: t for name, t in tensors.items() if name != lacking}, tmp_path / "b.safetensors", metadata)
        with pytest.raises(PSAError, match=says):
            from psa_jax.interop.native import load_adapter

            load_adapter(tmp_path / "b.safetensors", ((16, 2),), 20)
