"""Resampling in blocks: what one piece gives, at any pair of rates, without a large table."""

import math

import pytest
import torch
from torchaudio.functional import resample as in_one_piece

from modules import resampling
from modules.resampling import resample


@pytest.mark.parametrize(("orig_hz", "new_hz"), [(44100, 8000), (8000, 44100), (16000, 8000), (11025, 16000)])
@pytest.mark.parametrize("num_samples", [1, 700, 5000, 12345])
def test_blocks_equal_one_piece(orig_hz: int, new_hz: int, num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "_BLOCK_SAMPLES", 1000)
    signal = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(0))
    expected = in_one_piece(signal.double(), orig_hz, new_hz).float()
    torch.testing.assert_close(resample(signal, orig_hz, new_hz), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate_hz", [44101, 7999, 11127])
def test_rates_without_a_common_divisor(rate_hz: int) -> None:
    """There and back is the same signal, sample for sample, below the lower band edge."""
    tone = torch.sin(2 * math.pi * 440 * torch.arange(2 * rate_hz) / rate_hz)
    orig, new = resampling._terms(rate_hz, 8000)
    assert max(orig, new) < 5000 and abs(orig / new * 8000 / rate_hz - 1) < 1e-3
    low = resample(tone, rate_hz, 8000)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(len(low)) / rate_hz * orig / new)
    assert (low - expected)[200:-200].abs().max() < 5e-3
    back = resample(low, 8000, rate_hz)
    assert len(back) >= len(tone)
    assert (back[: len(tone)] - tone)[2000:-2000].abs().max() < 1e-2
    assert resampling._terms(8000, rate_hz) == (new, orig)


def test_equal_rates_change_nothing() -> None:
    signal = torch.randn(5)
    assert resample(signal, 8000, 8000) is signal
