"""An unknown key of a configuration, on the command line or in a sweep, names those that are nearest."""

import re

import pytest

from psa_jax.errors import PSAError
from psa_jax.tools.configs import nearest_keys, read_config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("beta", ["objective.beta"]),
        ("objective.bta", ["objective.beta"]),
        ("objectiv.beta", ["objective.beta"]),
        ("learning_rate", ["optimizer.learning_rate"]),
        ("optimizer.sft_weight", ["objective.sft_weight"]),
        ("validate.row", ["validate.rows"]),
        ("mini.users", ["data.mini.users"]),
        ("quantum", []),
    ],
)
def test_an_unknown_key_names_its_neighbours_in_any_group(key: str, nearest: list[str]) -> None:
    config = read_config("sd15")
    assert nearest_keys(key, config)[: len(nearest) or 1] == nearest
    assert len(nearest_keys("learning_rate", read_config("tiny"))) == 3  # of many
    said = f"did you mean {nearest[0]}" if nearest else "keys there: "
    with pytest.raises(PSAError, match=re.escape(said)):
        read_config("sd15", [(key, "1")])
