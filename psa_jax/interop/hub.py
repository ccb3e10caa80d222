"""Names that the Hugging Face Hub knows: licences of model cards, and ids of models. Imports nothing heavy."""

import difflib
import re

from psa_jax.errors import PSAError
from psa_jax.rules import quoted

UNKNOWN = "unknown"
"""The Hub's word for a licence that nobody has stated."""

_IDS = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0
gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_IDS.split())
"""Identifiers that a card's `license` may have. Source: the Hub's page on licences of repositories."""

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_LONGEST = 96


def license_id(text: str) -> str:
    """Checks an identifier of a licence.

    Returns:
      The text.

    Raises:
      PSAError: the Hub has no such identifier.
    """
    if text in LICENSES:
        return text
    near = difflib.get_close_matches(text.lower().replace(" ", "-"), sorted(LICENSES), n=1)
    raise PSAError(
        f"{quoted(text)} is no licence that the Hugging Face Hub knows; give "
        f"{f'{near[0]}, or ' if near else 'an identifier such as openrail++ or apache-2.0, or '}other for one that it "
        "does not list"
    )


def model_id(text: str) -> str:
    """Checks the id of a model on the Hub, such as stable-diffusion-v1-5/stable-diffusion-v1-5.

    Returns:
      The text.

    Raises:
      PSAError: no id, such as a path on this machine.
    """
    parts = text.split("/")
    fits = len(parts) == 2 and len(parts[1]) <= _LONGEST and all(map(_PART.fullmatch, parts))
    if not fits or "--" in text or ".." in text or text.endswith(".git"):
        raise PSAError(
            f"{quoted(text)} is no id of a model on the Hugging Face Hub; give ORG/NAME, such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return text
