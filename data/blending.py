"""Laying a drawn mark over a photo, and the mask that belongs to it.

    coverage c in [0, 1]   where the strokes are: geometry alone
    opacity  o in [0, 1]   how strongly the mark shows
    alpha    = o c         J = alpha B(I, W) + (1 - alpha) I

I is the photo, W the colour of the mark, B the blend function of the mode (normal: B = W; the others as in the W3C's
"Compositing and Blending Level 1", section 10). The mask is a function of c: a faint mark has the same one as a
strong mark. Made from alpha it would be empty for every opacity below one half.
"""

import numpy as np

MODES = ("normal", "multiply", "screen", "overlay")
MASK_RULES = ("half", "any", "alpha_visible")
_WHITE = 255.0


def composite(photo: np.ndarray, colour: np.ndarray, alpha: np.ndarray, *, mode: str = "normal") -> np.ndarray:
    """The photo with the mark over it, not rounded.

    Args:
        photo: the image below, 0 to 255, uint8 or float.
        colour: of the mark at each pixel, or one for all, 0 to 255.
        alpha: opacity times coverage, 0 to 1.
        mode: one of `MODES`.

    Shape:
        `(H, W, 3)`, `(H, W, 3)` or `(3,)`, `(H, W)` -> float64 `(H, W, 3)`

    Raises:
        ValueError: an unknown mode.
    """
    below, above = photo.astype(np.float64), colour.astype(np.float64)
    weight = alpha.astype(np.float64)[..., None]  # (H, W, 1)
    return weight * _blend(below, above, mode) + (1 - weight) * below


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Rounded to whole levels, halves upwards, limited to 0 to 255."""
    return np.clip(np.floor(image + 0.5), 0, _WHITE).astype(np.uint8)


def mask_of(
    coverage: np.ndarray, change: np.ndarray | None = None, *, rule: str = "half", least_change: float = 4
) -> np.ndarray:
    """Which pixels belong to the mark.

    Args:
        coverage: 0 to 1.
        change: what the mark did to each pixel (`change_of`); for the rule alpha_visible.
        rule: half: coverage of one half or more; any: above 0; alpha_visible: half, where the change is seen too.
        least_change: levels of 255 from which on a change is seen.

    Shape:
        `(H, W)` -> uint8 `(H, W)` of 0 and 1

    Raises:
        ValueError: an unknown rule.
    """
    if rule == "any":
        inside = coverage > 0
    elif rule == "half":
        inside = coverage >= 0.5
    elif rule == "alpha_visible":
        assert change is not None
        inside = (coverage >= 0.5) & (change >= least_change)
    else:
        raise ValueError(f"mask_rule must be one of {', '.join(MASK_RULES)}, got {rule!r}")
    return inside.astype(np.uint8)


def change_of(photo: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """The largest difference over the channels. uint8 `(H, W, 3)` twice -> uint8 `(H, W)`"""
    change = np.maximum(photo, marked) - np.minimum(photo, marked)
    return np.maximum(
        np.maximum(change[..., 0], change[..., 1]), change[..., 2]
    )  # faster than max over so short an axis


def visible_share(change: np.ndarray, mask: np.ndarray, *, least_change: float = 4) -> float:
    """Share of the mask's pixels that changed by `least_change` levels or more; 0 for an empty mask."""
    inside = mask == 1
    return float(np.mean(change[inside] >= least_change)) if inside.any() else 0.0


def _blend(below: np.ndarray, above: np.ndarray, mode: str) -> np.ndarray:
    """The blend function of two images, 0 to 255."""
    if mode == "normal":
        return above
    if mode == "multiply":
        return below * above / _WHITE
    if mode == "screen":
        return _WHITE - (_WHITE - below) * (_WHITE - above) / _WHITE
    if mode == "overlay":  # multiply where the photo is dark, screen where it is bright
        dark, bright = 2 * below * above / _WHITE, _WHITE - 2 * (_WHITE - below) * (_WHITE - above) / _WHITE
        return np.where(below <= _WHITE / 2, dark, bright)
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
