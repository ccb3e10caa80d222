"""Names of the columns that hold prompts, in shards and in batches."""

SAFE = "safe_"
"""Prefix of the columns that hold the safe prompt of a row's pair."""


def is_prompt(name: str) -> bool:
    """Whether a column holds a prompt for the text encoders: token ids or text embeddings."""
    return name.startswith(("input_ids", "text_"))
