"""Annotations are checked while tests run: types and shapes, also of functions defined inside of others."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from support.annotations import checked

from psa_jax.json_input import parse_json
from psa_jax.models.attention import gelu


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError, match="json_input.parse_json"):
        parse_json("{}", where=7)
    with pytest.raises(TypeCheckError, match="attention.gelu"):
        gelu(jnp.zeros(3, jnp.int32))


def define(kind: type):
    @jaxtyped(typechecker=checked)
    def inner(x: Float[np.ndarray, "a b"], y: Float[np.ndarray, " b"], *, other: kind | None = None) -> kind:
        return kind(x @ y) if other is None else other

    return inner


def test_functions_with_one_name_have_their_own_checks():
    good, bad = np.ones(2), np.ones(3)
    for kind, wrong in ((list, (1,)), (tuple, [1]), (list, (1,))):
        inner = define(kind)
        assert inner(np.ones((1, 2)), good) == kind([2.0])
        for _ in range(2):  # once more, when its check has been made
            with pytest.raises(TypeCheckError, match="b=2"):
                inner(np.ones((1, 2)), bad)
            with pytest.raises(TypeCheckError, match="other"):
                inner(np.ones((1, 2)), good, other=wrong)


def test_results_are_checked():
    @jaxtyped(typechecker=checked)
    def outer(x: Float[np.ndarray, " a"]) -> Float[np.ndarray, "a a"]:
        return x

    with pytest.raises(TypeCheckError, match="return value"):
        outer(np.ones(2))
