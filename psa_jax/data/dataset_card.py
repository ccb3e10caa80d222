"""README.md of a folder of shards: its content, what it was made from, and the terms of use."""

from collections.abc import Mapping
from typing import Any

from psa_jax.data.layouts import Layout

_CARD = """\
---
pretty_name: {title} as VAE moments ({config})
license: other
task_categories:
- text-to-image
tags:
- personalized-safety-alignment
- psa_jax
---
# {title} as VAE moments: {config}

Preference pairs, for training personal safety adapters: prompts, and the mean and log-variance of a Stable
Diffusion VAE (float16) in place of the chosen and the rejected picture. Made by psa_jax; format `{format}`.

    import tensorflow_datasets as tfds
    import psa_jax.data
    source = tfds.data_source("sage/{config}", data_dir=FOLDER, split="{split}")

## Counts

| split | rows | unsafe prompts | users | pictures |
|---|---|---|---|---|
{counts}

Distinct pictures in all: {pictures}. Encoded at {resolution} px{flips}.{text}

## Hashes

| of | sha256 |
|---|---|
{hashes}

`fingerprint.json` has the size and hash of every file here. Training refuses shards whose VAE fingerprint is not that
of its own model.

## Terms

- The moments decode back into the pictures. Prompts and pictures are {terms}, and so do
  the terms of the VAE. psa_jax's own licence covers neither.
- Many pictures and prompts are harmful by design. They are here to teach a model what somebody does not want to see.
- User ids and what each user bans are personal data. No other attribute of a profile is in here; the folder is made
  readable for its owner alone.
"""


def dataset_card(
    info: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], hashes: Mapping[str, str], layout: Layout
) -> str:
    """Text of the card, in Markdown.

    Args:
      info: contents of fingerprint.json.
      counts: split → its numbers of rows, unsafe prompts, users and pictures.
      hashes: description → sha256 of everything that the shards depend on.
      layout: of what they were made from.
    """
    return _CARD.format(
        title=layout.title,
        terms=layout.terms,
        config=f"{info['family']}_{info['resolution']}",
        format=info["format"],
        split=next(iter(counts)),
        counts="\n".join(f"| {split} | {' | '.join(map(str, row.values()))} |" for split, row in counts.items()),
        pictures=info["pictures"],
        resolution=info["resolution"],
        flips=", as they are and mirrored" if info["flips"] else "",
        text=" With the text encoders' states of every prompt." if info["text"] else "",
        hashes="\n".join(f"| {what} | `{value}` |" for what, value in hashes.items()),
    )
