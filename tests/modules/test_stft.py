"""The spectrum against a transform written out frame by frame, and what must hold for the way back."""

import math

import numpy as np
import pytest
import torch

from modules.stft import STFT, WINDOWS


def literal_spectrum(signal: np.ndarray, n_fft: int, hop: int, window: str) -> np.ndarray:
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    shape = np.sqrt(shape) if window == "sqrt_hann" else shape
    padded = np.pad(signal, n_fft // 2, mode="reflect")
    frames = [np.fft.rfft(shape * padded[k * hop : k * hop + n_fft]) for k in range(len(signal) // hop + 1)]
    return np.stack(frames, -1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n_fft", "hop"), [(32, 16), (20, 10), (32, 8), (6, 2)])
@pytest.mark.parametrize("num_samples", [17, 160, 171])
def test_spectrum_is_the_transform_of_each_frame(n_fft, hop, window, num_samples):
    signal = torch.randn(2, num_samples)
    spectrum = STFT(n_fft=n_fft, hop_samples=hop, window=window)(signal)
    assert spectrum.shape == (2, n_fft // 2 + 1, num_samples // hop + 1, 2)
    expected = np.stack([literal_spectrum(item, n_fft, hop, window) for item in signal.double().numpy()])
    expected = torch.view_as_real(torch.from_numpy(expected)).float()
    torch.testing.assert_close(spectrum, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_samples", [1, 2, 15, 16, 17, 32, 100, 159])
def test_there_and_back(window, num_samples):
    stft = STFT(n_fft=32, hop_samples=16, window=window).double()
    signal = torch.randn(3, num_samples, dtype=torch.float64, requires_grad=True)
    back = stft.inverse(stft(signal), num_samples)
    torch.testing.assert_close(back, signal, atol=1e-9, rtol=0)
    assert torch.autograd.grad(back.square().sum(), signal)[0].isfinite().all()


def test_a_tone_stands_in_its_bin():
    time = torch.arange(1600) / 16000
    tone = torch.sin(2 * math.pi * 1000 * time)[None]  # 20 periods in a frame of 320 samples
    power = STFT(n_fft=320, hop_samples=160)(tone).square().sum(-1)[0, :, 2:-2]  # (F, frames)
    assert (power.argmax(0) == 20).all()
    assert (power[18:23].sum(0) / power.sum(0)).min() > 0.99


def test_sqrt_hann_needs_no_divisor():
    """Half-overlapping frames of analysis times synthesis window add up to one: a stream can do without the rest."""
    window = STFT(n_fft=32, hop_samples=16).window
    torch.testing.assert_close(window[:16] ** 2 + window[16:] ** 2, torch.ones(16))


def test_float32_under_autocast():
    stft = STFT(n_fft=32, hop_samples=16)
    signal = torch.randn(2, 160)
    expected = stft(signal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrum = stft(signal)
        torch.testing.assert_close(spectrum, expected)
        torch.testing.assert_close(stft.inverse(spectrum, 160), signal)
        assert stft(signal.bfloat16()).dtype == stft.inverse(spectrum.bfloat16(), 160).dtype == torch.float32


def test_checkpoints_hold_no_window():
    assert not STFT(n_fft=32, hop_samples=16).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": "hamming"}, "window must be one of hann, sqrt_hann, got 'hamming'"),
        ({"n_fft": 31}, "n_fft must be even and at least 2, got 31"),
        ({"hop_samples": 17}, "hop_samples must be 1 to n_fft // 2 = 16, got 17"),
        ({"hop_samples": 0}, "hop_samples must be 1"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        STFT(**{"n_fft": 32, "hop_samples": 16} | arguments)


def test_wrong_input():
    stft = STFT(n_fft=32, hop_samples=16)
    for shape in [(5,), (1, 1, 5), (1, 0)]:
        with pytest.raises(ValueError, match="signal must have shape"):
            stft(torch.zeros(shape))
    for shape in [(1, 16, 5, 2), (1, 17, 5), (1, 17, 5, 1)]:
        with pytest.raises(ValueError, match=r"spectrum must have shape \(batch, 17, frames, 2\)"):
            stft.inverse(torch.zeros(shape), 5)
