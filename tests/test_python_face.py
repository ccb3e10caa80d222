"""The package's Python face: the same pictures as the command, in one line, and refusals in one line."""

import inspect
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.torch_adapters import random_adapter

import psa_jax
from psa_jax.categories import CATEGORIES
from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.interop.native import adapter_arrays, save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.schema import UserProfile

CHILD, ADULT = {"age": 9, "gender": "female"}, {"age": 44, "gender": "male"}
FEW = {"steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def sources(smallest_pipeline, tmp_path_factory):
    """Folder of a base model, an adapter for it, and a table of two users."""
    folder, model, encoder = tmp_path_factory.mktemp("face"), smallest_pipeline[1], get_encoder("features")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, kind="text", tokens=2)
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    save_adapter(random_adapter(config), folder / "a.safetensors", about)
    psa_jax.table_of([CHILD | {"user_id": "0000001"}, ADULT | {"user_id": "0000002"}]).save(
        folder / "table.safetensors"
    )
    return str(model.folder), str(folder / "a.safetensors"), str(folder / "table.safetensors")


@pytest.fixture(scope="module")
def pipe(sources):
    return psa_jax.load(sources[0], sources[1], table=sources[2])


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_one_picture_is_that_of_the_command(pipe, sources, tmp_path):
    words = [f"--model={sources[0]}", f"--adapter={sources[1]}", "--prompt=a cat", "--seed=3", "--steps=2"]
    words += ["--guidance=3", '--profile={"age": 9, "gender": "female"}', f"--out={tmp_path / 'out'}"]
    assert main(["generate", *words]) == 0
    ours = pipe.generate("a cat", profile=CHILD, seed=3, **FEW)
    with Image.open(tmp_path / "out" / "00000_3.png") as theirs:
        np.testing.assert_array_equal(pixels(ours), pixels(theirs))


def test_safe_latent_diffusion_is_that_of_the_command(sources, pipe, tmp_path):
    words = [f"--model={sources[0]}", "--prompt=a cat", "--seed=3", "--steps=2", "--guidance=3"]
    assert main(["generate", *words, "--sld=max", "--sld-concept=a mat", f"--out={tmp_path / 'out'}"]) == 0
    base = psa_jax.load(sources[0])
    ours, plain = (
        base.generate("a cat", seed=3, **FEW, **more) for more in ({"sld": "max", "sld_concept": "a mat"}, {})
    )
    with Image.open(tmp_path / "out" / "00000_3.png") as theirs:
        np.testing.assert_array_equal(pixels(ours), pixels(theirs))
        assert {"sld": "max", "sld_concept": "a mat"}.items() <= json.loads(theirs.text["psa_jax"]).items()
    assert (pixels(ours) != pixels(plain)).any()
    each = base.generate(["a cat"] * 2, seed=3, sld="max", sld_concept=["a mat", "cat"], **FEW)
    assert (pixels(each[0]) != pixels(each[1])).any()
    with pytest.raises(PSAError, match="leave out the adapter, or sld"):
        pipe.generate("a cat", profile=CHILD, sld="max", **FEW)
    with pytest.raises(PSAError, match="give sld, such as 'strong', or leave it out"):
        base.generate("a cat", sld_concept="a mat", **FEW)


def test_users_by_id_and_a_picture_for_each_prompt(pipe):
    both = pipe.generate(["a cat", "a cat"], user=["0000001", "0000002"], seed=3, **FEW)
    assert [type(picture) for picture in both] == [Image.Image] * 2
    np.testing.assert_array_equal(
        pixels(both[0]), pixels(pipe.generate(["a cat"] * 2, profile=CHILD, seed=3, **FEW)[0])
    )
    np.testing.assert_array_equal(
        pixels(both[1]), pixels(pipe.generate(["a cat"] * 2, profile=ADULT, seed=3, **FEW)[1])
    )
    assert np.abs(pixels(both[0]) - pixels(both[1])).max() > 3


def test_without_a_user_the_base_model_has_to_be_asked_for(pipe, sources):
    with pytest.raises(PSAError, match="no user is given; give profile= or user=, or allow_unprotected=True"):
        pipe.generate("a cat")
    base = psa_jax.load(sources[0])
    expected = base.generate("a cat", seed=3, **FEW)
    for picture in (
        pipe.generate("a cat", seed=3, allow_unprotected=True, **FEW),
        pipe.generate("a cat", seed=3, profile=CHILD, scale=0.0, **FEW),
    ):
        np.testing.assert_array_equal(pixels(picture), pixels(expected))


def test_an_adapter_reads_its_sizes_from_the_file(sources, pipe):
    adapter = psa_jax.load_adapter(sources[1])
    assert repr(adapter) == "Adapter(text, 2 user tokens, users of 33 numbers, 1 cross-attentions)"
    assert repr(pipe).startswith("Pipeline(sd1, 16x16 px, Adapter(text, 2 user tokens")
    for name, array in adapter_arrays(pipe.adapter).items():
        np.testing.assert_array_equal(adapter_arrays(adapter)[name], array)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"profile": CHILD, "user": "0000001"}, "both profile and user are given"),
        ({"profile": [CHILD, CHILD]}, "2 users for 1 prompts; give one, or one for each"),
        ({"profile": {"age": 9}}, "gender"),
        ({"profile": {"age": 98765, "gender": "female"}}, "age"),
        ({"user": "0000009"}, "0000009"),
        ({"user": ""}, "a user is str; give an id as text"),
        ({"profile": [None]}, "a user is NoneType; give an id as text"),
        ({"profile": CHILD, "guidance": float("nan")}, "guidance must be a finite number"),
        ({"profile": CHILD, "guidance": "4"}, "guidance must be a finite number"),
        ({"profile": CHILD, "steps": 2.0}, "steps must be a whole number"),
        ({"profile": CHILD, "size": 64}, "size must be (height, width)"),
        ({"profile": CHILD, "size": (64.0, 64.0)}, "size must be (height, width)"),
        ({"profile": CHILD, "sampler": 3}, "sampler must be"),
        ({"user": 1}, "a user is int; give an id as text, such as '0000001', or a profile"),
        ({"profile": 1}, "profile: expected key-value pairs, got int"),
        ({"profile": CHILD, "steps": 0}, "steps"),
        ({"profile": CHILD, "stepz": 3}, "setting 'stepz' is unknown; use steps, guidance"),
        ({"profile": CHILD, "seed": -1}, "seed"),
        ({"profile": CHILD, "seed": [1, 2]}, "2 seeds"),
        ({"profile": CHILD, "scale": float("nan")}, "scale"),
    ],
)
def test_bad_calls_are_one_line(pipe, call, says):
    with pytest.raises(PSAError) as caught:
        pipe.generate("a cat", **call)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "98765" not in str(caught.value)  # an attribute's value


@pytest.mark.parametrize(
    ("place", "options", "says"),
    [
        (lambda s: "/nowhere/model", {}, "/nowhere/model"),
        (lambda s: s[0], {"adapter": "/nowhere/a.safetensors"}, "no such adapter file"),
        (lambda s: "tiny", {"adapter": 1}, "trained for another base model"),
        (lambda s: s[0], {"table": 2}, "a table is for users of an adapter"),
        (lambda s: s[0], {"dtype": "float64"}, "dtype 'float64': choose float32"),
        (lambda s: s[0], {"adapter": 1, "table": "/nowhere/table.safetensors"}, "/nowhere/table.safetensors"),
        (lambda s: s[0], {"adapter": 1, "table": 1}, "not an embedding table of psa_jax"),
    ],
)
def test_bad_sources_are_one_line(sources, place, options, says):
    options = {name: sources[value] if isinstance(value, int) else value for name, value in options.items()}
    with pytest.raises(PSAError) as caught:
        psa_jax.load(place(sources), **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [[], [3], None, b"a cat", ["a cat", None]])
def test_what_is_no_prompt_is_one_line(pipe, prompt):
    """Without the checks of annotations that tests have."""
    with pytest.raises(PSAError, match="prompt must be a text, or a list of at least one text"):
        inspect.unwrap(type(pipe).generate)(pipe, prompt, profile=CHILD)


def test_users_by_id_need_a_table(sources):
    with pytest.raises(PSAError, match=r"users by id need load\(\.\.\., table=FILE\)"):
        psa_jax.load(sources[0], sources[1]).generate("a cat", user="0000001")


def test_guidance_and_numbers_of_prompts_share_a_program(pipe, sources):
    """A notebook tries values: only another size, sampler or number of steps is compiled."""
    fresh = psa_jax.load(sources[0], sources[1])
    four = fresh.generate("a cat", profile=CHILD, seed=3, steps=2, guidance=4)
    three = fresh.generate(["a cat"] * 3, profile=CHILD, seed=3, steps=2, guidance=3)
    assert len(fresh._generators) == 2  # one prompt, and up to four
    fresh.generate(["a cat"] * 4, profile=CHILD, seed=3, steps=2, guidance=5)
    assert len(fresh._generators) == 2
    assert np.abs(pixels(three[0]) - pixels(pipe.generate(["a cat"] * 3, profile=CHILD, seed=3, **FEW)[0])).max() == 0
    assert np.abs(pixels(four) - pixels(three[0])).max() > 0


def test_what_is_replaced_is_the_gate_of_the_adapter(smallest_pipeline, pipe, sources, tmp_path):
    model, encoder = smallest_pipeline[1], get_encoder("features")
    sizes = {"kind": "edit", "gate": "categories", "tokens": 0}
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, **sizes))
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    save_adapter(adapter, tmp_path / "a.safetensors", about)
    gated = psa_jax.load(sources[0], tmp_path / "a.safetensors", table=sources[2])
    found = gated.explain(["a cat", "at"], profile=[CHILD, ADULT])
    users = encoder.encode([UserProfile.from_mapping(profile) for profile in (CHILD, ADULT)])
    states = model.text_encoder(jnp.asarray(model.tokenize(["a cat", "at"]))).last
    for row, gates in zip(found, np.asarray(adapter.gate.parts(states, jnp.asarray(users))), strict=True):
        assert list(row) == list(CATEGORIES)
        np.testing.assert_allclose(list(row.values()), gates, atol=1e-6)
    assert gated.explain(["a cat", "at"], user=["0000001", "0000002"]) == found
    with pytest.raises(PSAError, match="no user is given"):
        gated.explain("a cat")
    with pytest.raises(PSAError, match="2 users for 1 prompts"):
        gated.explain("a cat", profile=[CHILD, ADULT])
    with pytest.raises(PSAError, match="the base model replaces nothing; load an adapter"):
        psa_jax.load(sources[0]).explain("a cat", profile=CHILD)
    with pytest.raises(PSAError, match="the text adapter has no gate by categories"):
        pipe.explain("a cat", profile=CHILD)


def test_importing_it_imports_nothing_else():
    code = "import sys, psa_jax; assert not {'jax', 'numpy', 'torch'} & set(sys.modules); print(psa_jax.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'load'" in done.stdout
    assert set(psa_jax.__all__) <= set(dir(psa_jax))
    with pytest.raises(AttributeError, match="no attribute 'laod'; it offers EmbeddingTable"):
        psa_jax.laod  # noqa: B018
