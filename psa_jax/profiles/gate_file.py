"""The gate file: the user half of a gate by categories alone, so that a profile need not leave its device.

A folder with

    gates.npz       the weights, and what a profile's numbers are made of
    psa_gates.py    a program of numpy alone that turns a profile into the seven numbers b_k

The server then gets b_k, in place of the profile or of the embedding: `psa(prompt, gates=…)`.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.interop.adapter_file import Tensors, adapter_hash
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.bans import BANS
from psa_jax.profiles.encoders import FeatureEncoder, get_encoder
from psa_jax.profiles.schema import AGE_GROUPS, ATTRIBUTES, CATEGORIES, MAX_AGE

GATE_FILE, PROGRAM_FILE = "gates.npz", "psa_gates.py"
FORMAT = "psa_jax.gates/1"


def require_gate(where: Path, config: AdapterConfig) -> None:
    """Raises PSAError for an adapter without a gate by categories; `where` is its file."""
    if not config.by_categories:
        raise PSAError(
            f"{where}: the {config.kind} adapter has no gate by categories; train one with adapter.kind=edit, "
            "adapter.gate=categories and adapter.tokens=0"
        )


def write_gates(tensors: Tensors, config: AdapterConfig, about: dict[str, Any], folder: Path, where: Path) -> None:
    """Writes the gate file and its program.

    Args:
      tensors, config, about: of the adapter.
      folder: to write into.
      where: the adapter's file, for errors.

    Raises:
      PSAError: an adapter without a gate by categories, or whose encoder is not one of features.
    """
    require_gate(where, config)
    name = about.get("encoder", "")
    encoder = get_encoder(name) if name.startswith("features") else None
    if not isinstance(encoder, FeatureEncoder) or encoder.fingerprint != about.get("encoder_fingerprint"):
        raise PSAError(
            f"{where}: trained with the encoder {name!r}, which a device cannot run with numpy alone; use one trained "
            "with the encoder features"
        )
    if about.get("standardised"):
        raise PSAError(
            f"{where}: trained on a standardised table, whose scale the gate file lacks; train on a plain one"
        )
    start = "user_gate."
    weights = {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
    bans = [f"{field}={value}|{'|'.join(banned)}" for field, values in BANS.items() for value, banned in values.items()]
    content = io.BytesIO()
    np.savez(
        content,
        format=np.asarray(FORMAT),
        adapter=np.asarray(adapter_hash(tensors, config)),
        fields=np.asarray(encoder.fields),
        categories=np.asarray(CATEGORIES),
        age_groups=np.asarray([f"{name}|{youngest}" for name, (youngest, _) in AGE_GROUPS.items()]),
        neutral=np.asarray([f"{name}={each.neutral}" for name, each in ATTRIBUTES.items() if each.neutral is not None]),
        max_age=np.asarray(MAX_AGE),
        bans=np.asarray(bans),
        **weights,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / GATE_FILE, content.getvalue())
    write(folder / PROGRAM_FILE, Path(__file__).with_name("gate_program.py").read_text(encoding="utf-8"))
