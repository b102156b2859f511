from fractions import Fraction

import numpy as np
import pytest
import torch

from data.augment import change_speed, draw_gains_db, speed_ratios


def test_gains_are_drawn_with_their_probability():
    gains_db = draw_gains_db(np.random.default_rng(0), 4000, gain_db=3.0, gain_p=0.25)
    changed = gains_db[gains_db != 0]
    assert 900 < len(changed) < 1100
    assert np.abs(changed).max() <= 3 and abs(changed.mean()) < 0.2 and changed.std() == pytest.approx(3**0.5, abs=0.1)
    assert not draw_gains_db(np.random.default_rng(0), 10, gain_db=3.0, gain_p=0.0).any()


def test_speed_factors_are_exact_ratios():
    assert speed_ratios([0.95, 1, 1.1]) == (Fraction(19, 20), Fraction(1), Fraction(11, 10))


@pytest.mark.parametrize("bad", [[], 1.05, [0.4], [2.1], [0.333], [float("nan")], ["fast"], [True], [0.95, None]])
def test_other_speed_factors_are_refused(bad):
    with pytest.raises(ValueError, match="speed must be"):
        speed_ratios(bad)


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.97, 1.0, 1.05, 2.0])
def test_speed_moves_a_tone_and_keeps_its_level(factor):
    (speed,) = speed_ratios([factor])
    tone = torch.sin(2 * torch.pi * 400 * torch.arange(8000) / 8000)
    faster = change_speed(tone, speed)
    assert len(faster) == -(-8000 // speed)
    expected = torch.sin(2 * torch.pi * 400 * factor * torch.arange(len(faster)) / 8000)
    torch.testing.assert_close(faster[100:-100], expected[100:-100], atol=0.01, rtol=0)
