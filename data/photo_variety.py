"""Few photos made many, before marks are drawn on them: turned, recoloured, and laid over one another.

A network that sees the same two dozen photos again and again learns their textures by heart, and takes new ones for
marks. What is done here keeps edges and grain, and no mark is drawn yet, so a mask stays exact.
"""

import math
from collections.abc import Callable

import numpy as np

from data.checks import number
from data.ranges import Range, check_range


class PhotoVariety:
    """Other photos from a photo. Shares are of the photos, each drawn for itself.

    Args:
        turn_p: turned by 90, 180 or 270 degrees, or mirrored top to bottom.
        recolour_p: colour channels exchanged, each with another gamma, one in three as a negative,
        gamma: [low, high], the range of the exponents, drawn uniformly in octaves.
        overlay_p: blended with another photo,
        overlay: [low, high], the range of the other photo's weight.

    Shape:
        `(photo, rng, another)`: uint8 `(S, S, 3)` -> the same; `another()` gives the photo that is laid over, in the
        same size, and is called only where one is.
    """

    def __init__(
        self,
        *,
        turn_p: float = 0.0,
        recolour_p: float = 0.0,
        gamma: Range = (0.5, 2.0),
        overlay_p: float = 0.0,
        overlay: Range = (0.2, 0.6),
    ) -> None:
        self.turn_p = number("turn_p", turn_p, least=0, most=1)
        self.recolour_p = number("recolour_p", recolour_p, least=0, most=1)
        self.gamma = check_range("gamma", gamma, least=0.1, most=10)
        self.overlay_p = number("overlay_p", overlay_p, least=0, most=1)
        self.overlay = check_range("overlay", overlay, least=0, most=1)

    def __call__(self, photo: np.ndarray, rng: np.random.Generator, another: Callable[[], np.ndarray]) -> np.ndarray:
        turning, recolouring, laying = rng.spawn(3)
        if laying.random() < self.overlay_p:
            weight = laying.uniform(*self.overlay)
            blended = photo * np.float32(1 - weight) + another() * np.float32(weight)
            photo = np.rint(blended).astype(np.uint8)
        if recolouring.random() < self.recolour_p:
            photo = _recoloured(photo, recolouring, self.gamma)
        if turning.random() < self.turn_p:
            photo = photo[::-1] if (quarters := turning.integers(4)) == 0 else np.rot90(photo, quarters)
        return np.ascontiguousarray(photo)


def _recoloured(photo: np.ndarray, rng: np.random.Generator, gamma: tuple[float, float]) -> np.ndarray:
    """By a table for each channel. Shape: uint8 (H, W, 3) -> same"""
    levels = np.linspace(0, 1, 256)
    if rng.random() < 1 / 3:
        levels = levels[::-1]
    exponents = 2.0 ** rng.uniform(math.log2(gamma[0]), math.log2(gamma[1]), 3)
    tables = np.rint(255 * levels[:, None] ** exponents).astype(np.uint8)  # (256, 3)
    return np.stack([tables[photo[..., source], channel] for channel, source in enumerate(rng.permutation(3))], -1)
