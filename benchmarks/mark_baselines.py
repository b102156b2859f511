"""A watermark detector without a network: what stands out from its neighbourhood is taken for marked.

Contrast = |pixel - mean or median of the square window around it|, the largest of the three channels. Which of the two,
the window and the threshold are those with the best micro IoU on examples that serve no other purpose.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

WINDOWS = {"mean": (5, 9, 15, 25, 41, 65), "median": (5, 9, 15)}  # pixels; wide medians are slow


class LocalContrast(NamedTuple):
    """Marked is what differs from its neighbourhood by more than `threshold` levels of 255."""

    centre: str
    window: int
    threshold: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 `(H, W, 3)` -> bool `(H, W)`"""
        return contrast(image, self.centre, self.window) > self.threshold

    def __str__(self) -> str:
        return f"more than {self.threshold} levels off the {self.centre} of {self.window} x {self.window} pixels"


def contrast(image: np.ndarray, centre: str, window: int) -> np.ndarray:
    """How far each pixel is from the mean or median of the window around it. uint8 `(H, W, 3)` -> uint8 `(H, W)`"""
    if centre == "median":
        around = ndimage.median_filter(image, size=(window, window, 1)).astype(np.float32)
    else:
        around = ndimage.uniform_filter(image.astype(np.float32), size=(window, window, 1))
    return np.abs(image - around).max(axis=2).round().astype(np.uint8)


def tune(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], windows: dict[str, Sequence[int]] = WINDOWS
) -> LocalContrast:
    """The best of all windows and thresholds on pairs of image, uint8 `(H, W, 3)`, and mask `(H, W)` of 0 and 1."""
    settings = [(centre, window) for centre, sizes in windows.items() for window in sizes]
    counts = np.zeros((len(settings), 2, 256), dtype=np.int64)  # (settings, not marked or marked, contrast)
    for image, mask in examples:
        for setting, (centre, window) in enumerate(settings):
            levels = contrast(image, centre, window)
            for value in (0, 1):
                counts[setting, value] += np.bincount(levels[mask == value], minlength=256)
    above = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]  # [..., t]: pixels with more than t levels, t from 0 on
    marked = counts[:, 1].sum(-1)[:, None]
    iou = above[:, 1] / np.maximum(marked + above[:, 0], 1)
    setting, threshold = np.unravel_index(iou.argmax(), iou.shape)
    centre, window = settings[int(setting)]
    return LocalContrast(centre, window, int(threshold))
