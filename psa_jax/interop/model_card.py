"""Model card (README.md) of an exported adapter: facts, loading, results, limits, privacy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from psa_jax.interop.hub import UNKNOWN
from psa_jax.models.adapter_config import AdapterConfig

_CARD = """\
---
{header}
---
# A personal safety adapter for Stable Diffusion ({format})

It reads an embedding of a user's profile and steers what a frozen Stable Diffusion generates for this user (PSA, arXiv
2508.01151). Written by psa_jax.

| | |
|---|---|
{facts}

## How to load

{loading}

## Results

{results}

## Licence

{terms}

## Limits

- It works with the base model, the width and the encoder above. Another table of embeddings is refused where that can
  be seen, and generates for the wrong person where it cannot: the number of columns may be the same.
- It was trained on what its profiles say. It knows nothing of a user beside the embedding, errs, and what it takes out
  of a picture may leave debris behind.

## Privacy and misuse

- Profiles (age, gender, religion, health) and their embeddings are personal data, and an embedding gives much of its
  profile away. Keep tables readable by their owner only, and log neither.{personal}
- This shapes preferences. It is no access control: whoever runs the model can leave it out. Do not rely on it alone
  where harm is possible, and never to keep content from minors without other means.
- Do not use it to find out about people what they have not told, to decide for others what they may see without their
  knowledge, or, with its sign turned around, to seek what it was trained to avoid.
"""

_RUNTIME = """\
    from psa_jax.torch import load_psa                       # pip install 'psa_jax[torch]'; imports no JAX
    psa = load_psa(pipe, {path!r}, table="table.safetensors")
    image = psa("a prompt", user="0000001", scale=1.0).images[0]"""

_LOADING = {
    "native": _RUNTIME.replace("{path!r}", "{weights!r}") + "\n\nor `psa-jax generate --adapter={weights}` in JAX.",
    "upstream": """\
The torch original reads it as its own `psa_adapter.bin`. `psa-jax import {weights} --model=DIR --out=FILE` brings it
back.""",
    "ip-adapter": """\
    import torch                                             # stock diffusers, no code of psa_jax
    from safetensors.torch import load_file
    pipe.load_ip_adapter(FOLDER, subfolder="", weight_name={weights!r}, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(1.0)
    user = load_file("table.safetensors")["embeddings"][0].reshape(1, 1, {user_dim})    # row 0 of a table
    both = torch.cat([torch.zeros_like(user), user])         # guidance: the unconditional side first, with zeros
    image = pipe("a prompt", ip_adapter_image_embeds=[both.to(pipe.dtype)]).images[0]

One user a call: stock diffusers mixes several in silence (huggingface/diffusers#9813); psa_jax.torch does not.""",
    "baked": """\
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)   # or StableDiffusionXLPipeline; `unet/` alone will do, too

One user is in the weights, at one scale, on both sides of guidance.""",
    "gates": """\
    python psa_gates.py '{{"age": 9, "gender": "female"}}' --bits          # on the user's device; Python and numpy

prints what the user bans, for `psa(prompt, gates=...)` of psa_jax.torch on a server that has the adapter itself.""",
    "diffusers": "    pipe = DiffusionPipeline.from_pretrained(FOLDER)\n" + _RUNTIME.replace("{path!r}", "FOLDER"),
}

UPSTREAM_DIM = 3584
"""Length of a user embedding in the torch original: the width of Qwen2.5-7B's states."""

UNCONDITIONAL_OF = {
    "native": "off",
    "diffusers": "off",
    "gates": "off",
    "upstream": "zeros",
    "ip-adapter": "zeros",
    "baked": "same",
}
"""Export format -> the adapter on the unconditional side of guidance. Rates measured in another way do not apply to it.

The native format supports all three ways; `off` is the default of `psa-jax generate` and `load_psa`.
"""

MEASURE = "psa-jax demo --all-ways --workdir=runs/demo"
"""Command that writes a report.json with the rates of every way. It resumes a run of `make demo`."""

_WITH_BASE = ("baked", "diffusers")
"""Formats that carry the base model's weights."""

_SPLITS = ("unseen", "seen")
_RATES = ("selectivity", "suppression", "retention", "clean", "benign_fidelity", "pass_rate")


@dataclasses.dataclass(frozen=True)
class Terms:
    """What only the person who exports an adapter can say.

    Attributes:
      license: of the adapter's weights, an identifier of the Hugging Face Hub; None if it was not stated.
      base_model: id of the base model on the Hub; None if it was not stated. Never a path.
      embedded: whether the exported folder holds the base model embedded in this package.
    """

    license: str | None = None
    base_model: str | None = None
    embedded: bool = False


def model_card(
    config: AdapterConfig,
    about: Mapping[str, Any],
    format_: str,
    weights: str,
    report: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    terms: Terms | None = None,
) -> str:
    """Text of the model card.

    Args:
      config: sizes of the adapter.
      about: metadata of the native file.
      format_: a value of `--format`.
      weights: name of the weight file.
      report: content of the run's report.json for this adapter; None if it was not evaluated.
      scale: strength in `baked` weights; other formats take it when pictures are generated.
      terms: licence and base model; None if nothing was stated.
    """
    terms = terms or Terms()
    return _CARD.format(
        header=_header(format_, terms),
        terms=_terms(format_, terms),
        format=format_,
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(config, about, terms)),
        loading=_LOADING[format_].format(weights=weights, user_dim=config.user_dim) + _of_upstream(config, format_),
        results=_results(report, format_, scale),
        personal="\n- These weights hold one user's embedding in effect: treat the folder as that user's data."
        if format_ == "baked"
        else "",
    )


def _header(format_: str, terms: Terms) -> str:
    """The card's metadata, as the Hub reads them: YAML, without the lines around it."""
    gates = format_ == "gates"  # draws nothing: profiles to seven numbers
    named = terms.base_model is not None and not gates
    lines = {
        "license": terms.license or UNKNOWN,
        "base_model": terms.base_model if named else None,
        "base_model_relation": ("finetune" if format_ == "baked" else "adapter") if named else None,
        "library_name": "psa_jax" if format_ in ("native", "upstream", "gates") else "diffusers",
        "pipeline_tag": "tabular-classification" if gates else "text-to-image",
    }
    tags = ["stable-diffusion", "personalized-safety-alignment", "psa_jax"]
    given = [f"{name}: {value}" for name, value in lines.items() if value]
    return "\n".join([*given, "tags:", *(f"- {tag}" for tag in tags)])


def _terms(format_: str, terms: Terms) -> str:
    """Sentences on whose licence holds for what."""
    own = (
        f"The adapter's weights: `{terms.license}`, as stated by who exported them."
        if terms.license not in (None, UNKNOWN)
        else "The adapter's weights: not stated (`psa-jax export --license=ID` states it). Ask who trained it."
    )
    if format_ not in _WITH_BASE:
        base = "The base model is not in here; its own licence may bind what was trained beside it, too."
    elif terms.embedded:
        base = "The base model in here is the small one of psa_jax, under Apache-2.0."
    else:
        base = "The base model is in here: its own licence holds for this folder, whatever the adapter's is."
    if terms.license == "other":
        own += " The text belongs beside this card, in a file LICENSE."
    page = f" It is at huggingface.co/{terms.base_model}." if terms.base_model and not terms.embedded else ""
    return f"{own} {base}{page}"


def _of_upstream(config: AdapterConfig, format_: str) -> str:
    words = upstream_limit(config) if format_ == "upstream" else ""
    return words and f"\n\n{words[0].upper()}{words[1:]}."


def upstream_limit(config: AdapterConfig) -> str:
    """Reason why the torch original's loader does not accept an adapter; "" if it does."""
    if config.user_dim == UPSTREAM_DIM:
        return ""
    return (
        f"the torch original's loader needs embeddings of its own width, {UPSTREAM_DIM} numbers of Qwen2.5-7B; this "
        f"adapter takes {config.user_dim}, so that its projection does not load there as it is"
    )


def _facts(config: AdapterConfig, about: Mapping[str, Any], terms: Terms) -> list[tuple[str, Any]]:
    """Known facts about an adapter, as rows of the card's table."""
    objective = about.get("objective", {})
    versions = about.get("versions", {})
    loss = objective.get("loss") or ("DPO" if objective else None)
    facts = [
        ("kind", f"`{config.kind}`"),
        ("gate", f"`{config.gate}`" if config.rewrites else None),
        ("user tokens T", config.tokens or None),
        ("length D of a user embedding", config.user_dim),
        ("base model", terms.base_model),
        ("its family" if terms.base_model else "family of the base model", about.get("family")),
        ("its cross-attentions", f"{len(config.layers)}, of width {config.cross_dim}"),
        ("its hash (sha256)", f"`{about['base_model']}`" if "base_model" in about else None),
        ("encoder of profiles", about.get("encoder")),
        ("its fingerprint", f"`{about['encoder_fingerprint']}`" if "encoder_fingerprint" in about else None),
        ("embeddings standardised", {True: "yes", False: "no"}.get(about.get("standardised"))),
        ("loss", loss),
        ("β", objective.get("beta")),
        ("training steps", about.get("steps")),
        ("made with", ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or None),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _results(report: Mapping[str, Any] | None, format_: str, scale: float) -> str:
    """Table of rates measured in the format's way, or a sentence that there are none."""
    report, way = report or {}, UNCONDITIONAL_OF[format_]
    measured = report.get("sampling", {})
    method = "psa" if measured.get("unconditional") == way else f"psa_{way}"
    if not any(name.startswith("psa") for split in _SPLITS for name in report.get(split, {})):
        return "No evaluation came with this adapter (`psa-jax export --report=report.json` adds one)."
    rows = [(split, report[split][method]) for split in _SPLITS if method in report.get(split, {})]
    if not rows or scale != 1.0:
        why = f"at scale {scale:g}" if rows else f"in this way (the unconditional side of guidance: `{way}`)"
        advice = f" `{MEASURE}` trains the demo's adapter, if it is not there yet, and measures all, at scale 1."
        return (
            f"Not measured {why}. The adapter was evaluated as `{measured.get('unconditional', 'unknown')}` at scale "
            "1, and rates of one way say little about another: suppression and retention shift by tens of percent."
            f"{'' if rows else advice}"
        )
    lines = [f"| users | {' | '.join(name.replace('_', ' ') for name in _RATES)} | prompts |", "|---" * 8 + "|"]
    for split, rates in rows:
        numbers = [f"{rates[name]:.1f}" if name in rates else "–" for name in _RATES]
        lines.append(f"| {split} | {' | '.join(numbers)} | {rates.get('n', '–')} |")
    how = ", ".join(f"{name} {measured[name]}" for name in ("steps", "guidance") if name in measured)
    lines.append(
        f"\nPercent, as this format generates (unconditional side `{way}`, scale 1{f', {how}' if how else ''}). "
        "Selectivity = suppression + retention − 100: 0 for any model that treats all users alike."
    )
    return "\n".join(lines)
