"""One picture of several signals: a spectrogram each, one below the other, on a common scale.

Signals are compared by eye, so all share axes and levels: an estimate that is too quiet, or holds what belongs to its
neighbour, looks so. Drawn with Pillow, which TensorBoard brings along.
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_RANGE_DB = 70.0  # from black to the loudest point
_COLUMNS, _ROWS = 500, 112  # pixels of one spectrogram
_LEFT, _BOTTOM, _GAP = 96, 16, 4  # of the labels, the time axis, between spectrograms
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
# Level 0 to 1 -> colour, interpolated: black, blue, magenta, orange, pale yellow; brightness rises evenly.
_COLOURS = np.array([[0, 0, 8], [48, 22, 110], [158, 40, 112], [240, 120, 48], [255, 250, 190]])


def spectrogram_figure(signals: Mapping[str, Tensor], sample_rate: int) -> Tensor:
    """Named signals in their order from top to bottom, frequency to the top, 70 dB from black to the loudest of all.

    *sample_rate*: in Hz. Windows of 32 ms (rounded up to a power of two). Axes in kHz and s.

    *Shape*: (T,) each -> (3, H, W), uint8
    """
    levels = {name: spectrogram_db(signal, sample_rate) for name, signal in signals.items()}
    loudest = max(level.max() for level in levels.values())
    duration_s = max(1, *(signal.numel() for signal in signals.values())) / sample_rate
    height = len(signals) * (_ROWS + _GAP)
    canvas = Image.new("RGB", (_LEFT + _COLUMNS, height + _BOTTOM), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, (name, level) in enumerate(levels.items()):
        top = row * (_ROWS + _GAP)
        picture = Image.fromarray(coloured(1 + (level - loudest) / _RANGE_DB))
        width = max(1, round(_COLUMNS * signals[name].numel() / sample_rate / duration_s))
        canvas.paste(picture.resize((width, _ROWS), Image.Resampling.BILINEAR), (_LEFT, top))
        draw.text((4, top + _ROWS // 2 - 6), name, _INK)
        for share, shift in ((1.0, 0), (0.5, -6), (0.0, -11)):
            label = f"{share * sample_rate / 2000:g}k"
            draw.text((_LEFT - 6 * len(label) - 6, top + round((1 - share) * _ROWS) + shift), label, _INK)
    step_s = _step(duration_s)
    for tick in range(int(duration_s / step_s) + 1):
        x = _LEFT + round(_COLUMNS * tick * step_s / duration_s)
        draw.line([(x, height - _GAP), (x, height)], _INK)
        label = f"{tick * step_s:g} s"
        draw.text((min(x, _LEFT + _COLUMNS - 6 * len(label)), height), label, _INK)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def spectrogram_db(signal: Tensor, sample_rate: int) -> np.ndarray:
    """Power in dB, highest frequency first; about as many frames as a picture has columns.

    *Shape*: (T,) -> (F, N)
    """
    size = 2 ** max(4, (sample_rate * 32 // 1000 - 1).bit_length())
    padded = torch.nn.functional.pad(signal.float(), (0, max(0, size - signal.numel())))
    hop = max(1, round((padded.numel() - size) / _COLUMNS))
    window = torch.hann_window(size, device=signal.device)
    spectrum = torch.stft(padded, size, hop, window=window, return_complex=True, center=False)
    return (10 * torch.log10(spectrum.abs().square().clamp_min(1e-20))).flip(0).cpu().numpy()


def coloured(levels: np.ndarray) -> np.ndarray:
    """Levels, 0 to 1 and clipped there, (H, W) -> colours from black to pale yellow (H, W, 3), uint8."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(levels, at, channel) for channel in _COLOURS.T], axis=-1).astype(np.uint8)


def _step(duration_s: float) -> float:
    """Between time ticks: 1, 2 or 5 times a power of ten, such that there are about five."""
    rough = duration_s / 5
    power = 10.0 ** np.floor(np.log10(rough))
    return next(float(factor * power) for factor in (1, 2, 5, 10) if factor * power >= rough)
