"""Separated sources get the levels at which they add up to the mixture."""

import torch

from modules.levels import restore_levels


def test_arbitrary_scales_and_signs_are_undone() -> None:
    sources = torch.randn(3, 2, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.3])[:, None]
    mixture = sources.sum(1)
    scaled = sources * torch.tensor([40.0, -0.02])[:, None]
    restored = restore_levels(scaled[:1], mixture[:1])
    # The quiet estimate is held back a little by the ridge; the loud one is exact.
    torch.testing.assert_close(restored[:, 0], sources[:1, 0], rtol=2e-2, atol=2e-2)
    restored = restore_levels(sources * torch.tensor([5.0, -5.0])[:, None], mixture)
    torch.testing.assert_close(restored, sources, rtol=1e-2, atol=5e-3)


def test_silence_stays_silence() -> None:
    sources = torch.randn(1, 2, 1000)
    sources[:, 1] = 0
    restored = restore_levels(sources, sources[:, 0] * 0.5)
    torch.testing.assert_close(restored[:, 0], sources[:, 0] * 0.5, rtol=1e-3, atol=1e-3)
    assert restored[:, 1].abs().max() == 0
    nothing = torch.zeros(2, 2, 100)
    assert torch.equal(restore_levels(nothing, torch.zeros(2, 100)), nothing)
    assert torch.equal(restore_levels(nothing, torch.randn(2, 100)), nothing)


def test_a_source_that_is_all_but_silent_is_not_blown_up() -> None:
    generator = torch.Generator().manual_seed(1)
    talker = torch.randn(1, 1, 4000, generator=generator)
    residue = 1e-4 * torch.randn(1, 1, 4000, generator=generator)
    mixture = talker[:, 0] + 0.1 * torch.randn(1, 4000, generator=generator)
    restored = restore_levels(torch.cat([talker, residue], 1), mixture)
    assert restored[:, 1].std() < 1e-3
