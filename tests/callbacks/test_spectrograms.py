"""Pictures of signals: physics of a tone, the common scale, the order of rows."""

import torch
from torch import Tensor

from callbacks.spectrograms import spectrogram_db, spectrogram_figure

RATE = 8000


def tone(hz: float, level: float = 1.0, seconds: float = 1.0) -> Tensor:
    return level * torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * RATE)) / RATE)


def row(figure: Tensor, number: int) -> Tensor:
    """Brightness of one spectrogram, (H, W)."""
    return figure[:, number * 116 : number * 116 + 112, 96:].sum(0)


def test_a_tone_is_bright_at_its_frequency() -> None:
    level = spectrogram_db(tone(1000), RATE)
    assert level.shape[0] == 129
    assert (level.argmax(0) == 128 - 1000 * 256 // RATE).all(), "the lowest frequency is the last row"
    picture = row(spectrogram_figure({"a": tone(1000)}, RATE), 0)
    assert abs(int(picture[:, 250].argmax()) - 112 * 3 // 4) <= 1


def test_one_scale_and_order_for_all() -> None:
    signals = {"mixture": tone(1000), "estimate1": tone(3000, 0.01), "target1": tone(1000, seconds=0.5)}
    figure = spectrogram_figure(signals, RATE)
    assert figure.dtype == torch.uint8 and figure.shape == (3, 3 * 116 + 16, 596)
    mixture, estimate, target = (row(figure, number) for number in range(3))
    assert estimate[:, :400].max() < 0.8 * mixture.max(), "40 dB less is darker"
    assert abs(int(estimate[:, 250].argmax()) - 112 // 4) <= 1
    assert torch.equal(target[20:, 10:200].max(0).values, mixture[20:, 10:200].max(0).values)
    assert (target[:, 260:] == 3 * 255).all(), "a shorter signal ends earlier"


def test_silent_and_very_short_signals() -> None:
    figure = spectrogram_figure({"nothing": torch.zeros(10), "one": torch.ones(1)}, RATE)
    assert figure.shape == (3, 2 * 116 + 16, 596)
    assert torch.equal(figure, spectrogram_figure({"nothing": torch.zeros(10), "one": torch.ones(1)}, RATE))
