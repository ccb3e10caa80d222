"""Names of the Hugging Face Hub, held against its own client."""

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from psa_jax.errors import PSAError
from psa_jax.interop.hub import LICENSES, license_id, model_id

IDS = [
    "a/" + "b" * 96,
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/sdxl-turbo",
    "a/b",
    "A_1/x.y-z",
    "_a/b_",
]
NO_IDS = [
    "",
    "/",
    "a/b/c",
    "/data/model",
    "./model",
    "~/model",
    "a//b",
    "a/.b",
    "-a/b",
    "a/b-",
    "a/b--c",
    "a/b..c",
    "a/b.git",
    "a b/c",
    "a/b\nlicense: mit",
    "a/" + "b" * 97,
    "C:\\models\\a/b",
]


@pytest.mark.parametrize("text", IDS)
def test_ids_that_the_hub_takes(text):
    validate_repo_id(text)
    assert model_id(text) == text


@pytest.mark.parametrize("text", NO_IDS, ids=repr)
def test_what_the_hub_refuses_is_refused(text):
    with pytest.raises(HFValidationError):
        validate_repo_id(text)
    with pytest.raises(PSAError, match="is no id of a model on the Hugging Face Hub; give ORG/NAME"):
        model_id(text)


def test_a_name_without_an_organisation_is_no_id():
    """The Hub's client takes it; a folder's name looks the same."""
    with pytest.raises(PSAError, match="give ORG/NAME"):
        model_id("stable-diffusion-v1-5")


@pytest.mark.parametrize("text", ["apache-2.0", "creativeml-openrail-m", "openrail++", "mit", "other", "unknown"])
def test_licences_of_the_hub(text):
    assert license_id(text) == text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Apache 2.0", "give apache-2.0, or other"),
        ("openrail+", "openrail"),
        ("", "such as openrail[+][+] or"),
        ("§", "or other"),
    ],
)
def test_another_word_is_answered_with_the_nearest(text, advice):
    with pytest.raises(PSAError, match=f"no licence that the Hugging Face Hub knows; .*{advice}"):
        license_id(text)


def test_identifiers_are_plain_words_of_yaml():
    """They are written without quotes."""
    yaml = pytest.importorskip("yaml")
    assert all(yaml.safe_load(f"license: {name}") == {"license": name} for name in LICENSES)
