"""Levels of echo, near end and noise against each other, of numpy signals.

A ratio is one of levels while there is sound: talkers pause, and a pause says nothing about how loud they are.
"""

from collections.abc import Callable

import numpy as np
import torch

from data.levels import EMPTY_RMS, common_gain

_FRAME = 320  # samples, 20 ms at 16 kHz, in which activity is judged
_ACTIVE_DB = 30.0  # below the loudest frame is a pause


def rms(signal: np.ndarray) -> float:
    """Root mean square. Shape: `(T,)` -> number"""
    return float(np.sqrt(np.square(signal).mean()))


def active_rms(signal: np.ndarray) -> float:
    """Root mean square over the frames of 320 samples that are within 30 dB of the loudest.

    Shape: `(T,)` -> number
    """
    if len(signal) < _FRAME:
        return rms(signal)
    powers = np.square(signal[: len(signal) // _FRAME * _FRAME]).reshape(-1, _FRAME).mean(-1)  # (frames,)
    return float(np.sqrt(powers[powers >= powers.max() * 10 ** (-_ACTIVE_DB / 10)].mean()))


def gain_for_ratio_db(
    reference: np.ndarray, signal: np.ndarray, *, ratio_db: float, level: Callable[[np.ndarray], float] = active_rms
) -> float:
    """What `signal` must be multiplied with to lie `ratio_db` below `reference`; 1 where one of the two is silence.

    Shape: `(T,)`, `(T,)` -> number
    """
    own, other = level(signal), level(reference)
    if min(own, other) <= EMPTY_RMS:
        return 1.0
    return other / own * 10 ** (-ratio_db / 20)


def level_ratio_db(reference: np.ndarray, signal: np.ndarray) -> float:
    """Level of `reference` over that of `signal` in dB: inf without signal, otherwise -inf without reference."""
    own, other = active_rms(signal), active_rms(reference)
    if own <= EMPTY_RMS:
        return float("inf")
    return float(20 * np.log10(other / own)) if other > EMPTY_RMS else float("-inf")


def gain_to_level(signal: np.ndarray, *, level_db: float) -> float:
    """What brings a signal to an RMS of `level_db` (dB relative to full scale), less where it would pass full scale;
    1 for silence.

    Shape: `(T,)` -> number
    """
    return float(common_gain(torch.from_numpy(signal), level_db=level_db))
