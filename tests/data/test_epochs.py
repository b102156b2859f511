"""Settings that change by epoch."""

import pytest

from data.epochs import at_epoch, values_of


def test_value_of_an_epoch() -> None:
    assert [at_epoch([[10, 1.0], [0, 4.0]], epoch) for epoch in (0, 9, 10, 99)] == [4.0, 4.0, 1.0, 1.0]
    assert at_epoch(2, 7) == 2
    assert values_of("crop", [[0, 1], [10, 4]]) == [1, 4] and values_of("crop", 3) == [3]


@pytest.mark.parametrize(
    "setting",
    [[], [[1, 2]], [[0, 1], [-1, 2]], [["0", 1]], [[0, 1], [1.5, 2]], [[0, 1], [0, 2]], [0, 4]],
)
def test_wrong_epochs(setting: list) -> None:
    with pytest.raises(ValueError, match=r"^crop: give a value, or \[\[0, value"):
        values_of("crop", setting)
