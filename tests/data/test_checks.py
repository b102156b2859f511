"""Numbers that a user typed."""

import pytest

from data.checks import number, whole_number


def test_numbers_come_back_in_their_type() -> None:
    assert whole_number("n", 2e4, least=1) == 20000 and isinstance(whole_number("n", 2e4, least=1), int)
    assert number("x", 1, least=0, most=1) == 1.0


@pytest.mark.parametrize("value", [0, 2.5, "2", None, True, float("nan"), float("inf"), [1]])
def test_no_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match="^n must be a whole number of at least 1, got"):
        whole_number("n", value, least=1)


@pytest.mark.parametrize("value", [-0.1, 1.1, "1", None, False, float("nan")])
def test_no_number(value: object) -> None:
    with pytest.raises(ValueError, match="^x must be a number from 0 to 1, got"):
        number("x", value, least=0, most=1)
