"""Options of predict.py are held to what `System.predict` declares, or has as its defaults."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from launch.errors import ConfigError
from launch.options import checked_options, described
from models.conv_tasnet import ConvTasNet


class Declared:
    """As a system has them."""

    inputs = {"image": "image"}

    def predict(
        self,
        image: Any,
        *,
        sensitivity: float | None = None,
        tile: int = 512,
        flips: bool = False,
        region: Sequence[int] | None = None,
        blend: Literal["mean", "first"] = "mean",
        precision: str = "auto",
        outputs: Sequence[str] = ("mask", "overlay"),
        plain=0.5,  # no hint: its default tells
        several=(1, 2),
        unset=None,
    ) -> None: ...


GOOD = [
    {"sensitivity": 1},
    {"sensitivity": None, "region": None, "unset": None},
    {"tile": 256, "flips": True, "region": [0, 0, 10, 10], "blend": "first", "precision": "32"},
    {"outputs": ["mask"], "plain": 2, "several": ["any", 3], "unset": 0.5},
]
BAD = [
    ({"sensitivity": "high"}, "sensitivity must be a number or null, got 'high'"),
    ({"sensitivity": float("nan")}, "sensitivity must be a number or null, got nan"),
    ({"tile": 2.5}, "tile must be a whole number, got 2.5"),
    ({"tile": True}, "tile must be a whole number, got True"),
    ({"tile": None}, "tile must be a whole number, got None"),
    ({"flips": "yes"}, "flips must be true or false, got 'yes'"),
    ({"flips": 1}, "flips must be true or false, got 1"),
    ({"region": [0, 0.5]}, "region must be a list of whole numbers or null, got [0, 0.5]"),
    ({"blend": "sum"}, "blend must be one of mean, first, got 'sum'"),
    ({"precision": ["32"]}, "precision must be text, got ['32']"),
    ({"outputs": "mask"}, "outputs must be a list of names, got 'mask'"),
    ({"plain": "x"}, "plain must be a number, got 'x'"),
    ({"several": 3}, "several must be a list of things, got 3"),
    ({"unset": "x"}, "unset must be a number or null, got 'x'"),
    ({"tiles": 3}, "tiles: Declared has no such option; it has sensitivity, tile, flips, region, blend"),
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_values_of_the_declared_kind_are_taken(options: dict[str, Any]) -> None:
    assert checked_options(Declared(), options) == options  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "expected"), BAD, ids=str)
def test_others_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_options(Declared(), options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_a_number_that_is_a_name() -> None:
    assert checked_options(Declared(), {"precision": 16}) == {"precision": "16"}  # type: ignore[arg-type]


def test_all_problems_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        checked_options(Declared(), {"tile": "x", "tiles": 3, "flips": True, "plain": "y"})  # type: ignore[arg-type]
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["tile", "tiles:", "plain"]


def test_a_system_of_the_house() -> None:
    system = ConvTasNet(num_filters=8, bottleneck_channels=4, hidden_channels=8, num_blocks=1, num_repeats=1)
    checked_options(system, {"chunk_s": 30, "overlap_s": 2.0, "stream_frames": None})
    with pytest.raises(ConfigError, match="^stream_frames must be a whole number or null, got 'abc'$"):
        checked_options(system, {"stream_frames": "abc"})
    with pytest.raises(ConfigError, match="^chunk: ConvTasNet has no such option; it has chunk_s, overlap_s"):
        checked_options(system, {"chunk": 3})


def test_options_in_a_message_are_those_that_were_chosen() -> None:
    chosen = {"sensitivity": None, "tile": 512, "flips": True, "region": [0, 1, 2, 3], "outputs": ["mask", "overlay"]}
    assert described(Declared(), chosen) == "flips=true, region=[0,1,2,3]"  # type: ignore[arg-type]
