"""What a value may be, and how an error shows one."""

import pytest

from psa_jax.rules import COUNT, COUNT_OR_NONE, FINITE, SIZE, optional, quoted


def test_counts_have_both_ends():
    assert [COUNT.holds(value) for value in (0, 1, 2**31 - 1, 2**31, True, 1.0)] == [False, True, True, *3 * [False]]
    assert COUNT_OR_NONE.holds(0) and SIZE.holds(65536) and not SIZE.holds(65537)


@pytest.mark.parametrize(
    "value", [10**400, -(10**5000), float("nan"), float("inf"), True, "1"], ids=lambda value: type(value).__name__
)
def test_a_number_is_one_that_a_float_can_hold(value):
    assert not FINITE.holds(value) and not optional(FINITE).holds(value)


@pytest.mark.parametrize(("value", "shown"), [("a\udcff", r"'a\udcff'"), (10**20, str(10**20)), (None, "None")])
def test_a_short_value_is_shown_whole(value, shown):
    assert quoted(value) == shown


@pytest.mark.parametrize("value", ["x" * 5000, 10**5000, [1] * 5000], ids=lambda value: type(value).__name__)
def test_a_long_value_is_cut(value):
    """Python refuses to write 10^5000 in decimal digits."""
    assert len(quoted(value)) == 81 and quoted(value).endswith("…")
