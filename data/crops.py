"""Random crops of recordings: of a given length, and of speech not silent where that can be had."""

from collections.abc import Callable, Sequence

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
    """A random crop that is not silent, see `not_silent`. `(count,)`"""
    return not_silent(lambda: random_crop(audio, rng, rows, count), level=lambda crop: float(rms(crop)))


def not_silent(draw: Callable[[], Tensor], *, level: Callable[[Tensor], float]) -> Tensor:
    """What is drawn; where its level (an RMS) is nearly none it is drawn again, up to three times, then the loudest is
    taken.
    """
    drawn: list[tuple[float, Tensor]] = []
    for _ in range(_TRIES):
        crop = draw()
        drawn.append((level(crop), crop))
        if drawn[-1][0] >= 10 ** (_SILENCE_DB / 20):
            break
    return max(drawn, key=lambda pair: pair[0])[1]
