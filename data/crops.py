"""Random crops of recordings: of a given length, and of speech not silent where that can be had."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.cache import RowReader
from data.levels import rms

_SILENCE_DB = -45.0  # RMS below which a crop holds hardly any speech: pauses lie near -60, speech near -25 dB
_TRIES = 4


def random_crop(audio: RowReader, rng: np.random.Generator, rows: Sequence[int], count: int) -> Tensor:
    """A random crop of a random one of the rows, continued with the next ones where it is too short. `(count,)`"""
    position = int(rng.integers(len(rows)))
    pieces, missing = [], count
    while missing > 0:
        row = rows[position % len(rows)]
        available = audio.num_samples[row]
        length = min(available, missing)
        start = int(rng.integers(available - length + 1))
        piece = audio.read(row, start=start, count=length)
        pieces.append(piece)
        missing -= len(piece)
        position += 1
    return torch.cat(pieces)


def speech_crop(audio: RowReader, rng: np.random.Generator, rows: Sequence[int], count: int) -> Tensor:
    """A random crop that is not silent: one that is nearly so is drawn again, up to three times; then the loudest is
    taken. `(count,)`
    """
    best, best_rms = torch.zeros(count), -1.0
    for _ in range(_TRIES):
        crop = random_crop(audio, rng, rows, count)
        level = float(rms(crop))
        if level > best_rms:
            best, best_rms = crop, level
        if level >= 10 ** (_SILENCE_DB / 20):
            break
    return best
