"""Changes of a talker beside the random crop: gain and speed.

Speed is changed by resampling, so pitch and formants move with it. The factors are ratios of small integers: then the
resampling filter has few phases, and one is kept for each factor.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from torch import Tensor
from torchaudio.transforms import Resample

MAX_DENOMINATOR = 100
SLOWEST, FASTEST = Fraction(1, 2), Fraction(2)


def draw_gains_db(rng: np.random.Generator, count: int, *, gain_db: float, gain_p: float) -> np.ndarray:
    """`count` gains in dB, each with probability `gain_p` uniform in [-gain_db, gain_db], otherwise 0."""
    changed = rng.random(count) < gain_p
    return np.where(changed, rng.uniform(-gain_db, gain_db, count), 0.0)


def speed_ratios(factors: Sequence[float]) -> tuple[Fraction, ...]:
    """Speed factors as exact ratios, 0.95 as 19 / 20.

    Raises:
        ValueError: none, or one that is not a number from 0.5 to 2 with at most two decimals.
    """
    if not isinstance(factors, list | tuple) or not factors:
        raise ValueError(f"speed must be a list of factors, such as [0.95, 1.0, 1.05], got {factors!r}")
    ratios = []
    for factor in factors:
        number = isinstance(factor, int | float) and math.isfinite(factor)
        ratio = Fraction(str(factor)) if number and not isinstance(factor, bool) else Fraction(0)
        if not SLOWEST <= ratio <= FASTEST or ratio.denominator > MAX_DENOMINATOR:
            raise ValueError(f"speed must be factors from 0.5 to 2 with at most two decimals, got {factor!r}")
        ratios.append(ratio)
    return tuple(ratios)


def change_speed(signal: Tensor, speed: Fraction) -> Tensor:
    """The signal `speed` times as fast, at the same sample rate: a tone of f Hz becomes one of `speed * f` Hz.

    Shape:
        `(T,)` -> `(ceil(T / speed),)`
    """
    return signal if speed == 1 else _resampler(speed.numerator, speed.denominator)(signal)


@lru_cache(maxsize=64)
def _resampler(orig: int, new: int) -> Resample:
    return Resample(orig, new)
