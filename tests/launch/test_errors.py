"""What is a user's mistake, and what is said about it."""

import pytest
from omegaconf import OmegaConf

from launch.build import plain
from launch.errors import is_users_mistake, one_line


def test_a_section_that_another_key_points_into_is_gone() -> None:
    cfg = OmegaConf.create({"model": {"align": None}, "data": {"max_delay_ms": "${model.align.max_delay_ms}"}})
    with pytest.raises(ValueError) as raised:
        plain(cfg)
    assert is_users_mistake(raised.value)
    line = one_line(raised.value)
    assert line.startswith("data.max_delay_ms: Error trying to access model.align.max_delay_ms") and "\n" not in line
    assert not is_users_mistake(ValueError("of ours"))
