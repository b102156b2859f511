"""Resampling of whole recordings of any length and rate.

torchaudio's resampler (windowed sinc) does the work; this keeps what it needs small.
* It goes over a recording in blocks with a margin as long as the filter: the result is that of one piece, but no
  copies of a long recording are made on the way.
* Its table of filters has as many entries as the product of both rates, common divisors taken out: 1.4 GB between
  44101 and 8000 Hz. The ratio of such rates is taken as the nearest one of small numbers, off by less than a
  thousandth: too little for a network to mind, and undone on the way back, for which the inverse ratio is taken.
* The table is made in float64; left to itself torchaudio makes it in float32, which costs up to 1e-4.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torchaudio.transforms import Resample

_MAX_TERM = 640  # of the smaller rate; 11025 : 16000 Hz is 441 : 640
_BLOCK_SAMPLES = 2**19
_FILTER_WIDTH = 6  # torchaudio's defaults, fixed here because the margin is computed from them
_ROLLOFF = 0.99


def resample(signal: Tensor, orig_hz: int, new_hz: int) -> Tensor:
    """From one rate to another; there and back gives at least the samples that there were.

    Shape: (…, T) -> (…, ceil(T * new_hz / orig_hz)).
    """
    orig, new = _terms(orig_hz, new_hz)
    if orig == new:
        return signal
    convert = Resample(orig, new, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF, dtype=torch.float64).to(signal)
    # Output sample k * new coincides with input sample k * orig: pieces begin there.
    num_units = math.ceil(signal.shape[-1] / orig)
    step = max(1, _BLOCK_SAMPLES // max(orig, new))
    margin = math.ceil(_FILTER_WIDTH / (min(orig, new) * _ROLLOFF)) + 1
    output = signal.new_empty(*signal.shape[:-1], math.ceil(signal.shape[-1] * new / orig))
    for first in range(0, num_units, step):
        before = min(first, margin)
        piece = convert(signal[..., (first - before) * orig : (first + step + margin) * orig])
        piece = piece[..., before * new : (before + step) * new]
        output[..., first * new : first * new + piece.shape[-1]] = piece
    return output


def _terms(orig_hz: int, new_hz: int) -> tuple[int, int]:
    """Small integers with the ratio of the rates; exchanged when the rates are."""
    ratio = Fraction(max(orig_hz, new_hz), min(orig_hz, new_hz)).limit_denominator(_MAX_TERM)
    high, low = ratio.numerator, ratio.denominator
    return (high, low) if orig_hz >= new_hz else (low, high)
