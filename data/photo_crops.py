"""Random square crops of photos, and of photos together with their masks.

A photo that marks are still to be drawn on may be scaled freely. A mask that is known is not: thin strokes of a mark
do not survive it, so a pair stays at native scale unless limits are given.
"""

import math

import numpy as np
from PIL import Image


def crop_photo(
    photo: np.ndarray,
    rng: np.random.Generator,
    size: int,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
) -> np.ndarray:
    """A random part of the photo, scaled and cut in one go.

    Args:
        photo: any size.
        size: side of the crop in pixels.
        scale: range of the factor by which the photo is enlarged, drawn uniformly in octaves. A photo that is too small
            for a crop at that scale is enlarged as far as needed.
        flip: mirror one half of the crops left to right.

    Shape:
        uint8 `(H, W, 3)` -> uint8 `(size, size, 3)`
    """
    height, width = photo.shape[:2]
    side = min(size / draw_scale(rng, scale), height, width)  # of the part, in pixels of the photo
    top, left = rng.uniform(0, height - side), rng.uniform(0, width - side)
    crop = _scaled(photo, (top, left, top + side, left + side), size, Image.Resampling.BICUBIC)
    return _mirrored(rng, flip, crop)[0]


def crop_pair(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    size: int,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The same random part of an image and of its mask; at scale 1 no pixel is changed.

    Args:
        image, mask: of one size. Where they are smaller than the crop, both are continued as in a mirror.
        size: side of the crop in pixels.
        scale: range of the factor by which both are enlarged, the mask by its nearest values.
        flip: mirror one half of the crops left to right.

    Shape:
        uint8 `(H, W, 3)`, uint8 `(H, W)` -> uint8 `(size, size, 3)`, uint8 `(size, size)`
    """
    assert image.shape[:2] == mask.shape
    factor = draw_scale(rng, scale)
    side = max(1, round(size / factor))  # whole pixels: image and mask must not be shifted against one another
    image, mask = _at_least(image, side), _at_least(mask, side)
    top, left = (int(rng.integers(0, length - side + 1)) for length in mask.shape)
    part = (slice(top, top + side), slice(left, left + side))
    image, mask = image[part], mask[part]
    if side != size:
        box = (0, 0, side, side)
        image = _scaled(image, box, size, Image.Resampling.BICUBIC)
        mask = _scaled(mask, box, size, Image.Resampling.NEAREST)
    image, mask = _mirrored(rng, flip, image, mask)
    return image, mask


def draw_scale(rng: np.random.Generator, scale: tuple[float, float]) -> float:
    """A factor in the range; halving is as likely as doubling."""
    return 2.0 ** rng.uniform(math.log2(scale[0]), math.log2(scale[1]))


def _scaled(
    image: np.ndarray, box: tuple[float, float, float, float], size: int, resample: Image.Resampling
) -> np.ndarray:
    """The part `box` = (top, left, bottom, right), which may lie between pixels, as a square of `size` pixels."""
    top, left, bottom, right = box
    y, x = math.floor(top), math.floor(left)
    part = Image.fromarray(image[y : math.ceil(bottom), x : math.ceil(right)])  # a copy; of the whole photo it is slow
    inside = (left - x, top - y, right - x, bottom - y)
    return np.array(part.resize((size, size), resample, box=inside, reducing_gap=2.0))


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    """The image continued to the right and downwards, as in a mirror, up to `side` pixels."""
    missing = [(0, max(0, side - length)) for length in image.shape[:2]]
    if not any(after for _, after in missing):
        return image
    return np.pad(image, missing + [(0, 0)] * (image.ndim - 2), mode="symmetric")


def _mirrored(rng: np.random.Generator, flip: bool, *images: np.ndarray) -> list[np.ndarray]:
    """All images mirrored left to right, or none."""
    mirrored = rng.random() < 0.5 and flip
    return [np.ascontiguousarray(image[:, ::-1] if mirrored else image) for image in images]
