"""What happens to a picture after a mark was laid over it: editing, resizing, blur, noise, JPEG.

The picture alone is changed; none of these moves a pixel, so its mask stays as it is.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from data.blending import to_uint8
from data.checks import number
from data.ranges import Range, check_range

_SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}  # Pillow's numbers


@dataclass(frozen=True, kw_only=True)
class Distortions:
    """Random changes of a picture, in the order of the arguments. Ranges are [low, high] and drawn from uniformly.

    Args:
        colour_p: share of the pictures whose brightness, contrast and saturation change,
        colour: each by a factor of its own.
        rescale_p: share that is made smaller and brought back to size,
        rescale: the factor of the smaller size.
        blur_p: share that is blurred,
        blur: standard deviation of the Gaussian in pixels.
        noise_p: share that gets Gaussian noise,
        noise: standard deviation in levels of 255.
        jpeg_p: share that is compressed, one half of them with colours at half resolution (4:2:0),
        jpeg_quality: as Pillow counts it.

    Shape:
        `(picture, rng)` -> picture, record; uint8 `(H, W, 3)`. The record says what was done, for JSON.

    Raises:
        ValueError: a value that cannot be used, by its key.
    """

    colour_p: float = 0.3
    colour: Range = (0.85, 1.15)  # more would make white marks vanish on bright skies
    rescale_p: float = 0.2
    rescale: Range = (0.5, 0.9)
    blur_p: float = 0.1
    blur: Range = (0.3, 1.0)
    noise_p: float = 0.15
    noise: Range = (1.0, 6.0)
    jpeg_p: float = 0.7
    jpeg_quality: Range = (50, 95)

    def __post_init__(self) -> None:
        for name in ("colour", "rescale", "blur", "noise", "jpeg"):
            number(f"{name}_p", getattr(self, f"{name}_p"), least=0, most=1)
        check_range("colour", self.colour, least=0, most=4)
        check_range("rescale", self.rescale, least=0.05, most=1)
        check_range("blur", self.blur, least=0, most=50)
        check_range("noise", self.noise, least=0, most=255)
        check_range("jpeg_quality", self.jpeg_quality, least=1, most=100)

    def __call__(self, picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        # All is drawn, whether it is used or not: one setting does not change what another one does.
        chance = rng.random(5)
        factors = rng.uniform(*self.colour, 3)
        scale, sigma, level = rng.uniform(*self.rescale), rng.uniform(*self.blur), rng.uniform(*self.noise)
        quality = int(rng.integers(round(self.jpeg_quality[0]), round(self.jpeg_quality[1]) + 1))
        subsampling = ("4:4:4", "4:2:0")[rng.integers(2)]
        record: dict[str, Any] = {}
        image = Image.fromarray(picture)
        if chance[0] < self.colour_p:
            image = _recoloured(image, factors)
            record["colour"] = [float(factor) for factor in factors]
        if chance[1] < self.rescale_p:
            image = _there_and_back(image, scale)
            record["rescale"] = float(scale)
        if chance[2] < self.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(sigma))
            record["blur"] = float(sigma)
        if chance[3] < self.noise_p:
            noise = rng.standard_normal(picture.shape, dtype=np.float32) * level
            image = Image.fromarray(to_uint8(np.asarray(image) + noise))
            record["noise"] = float(level)
        if chance[4] < self.jpeg_p:
            image = compressed(image, quality, subsampling)
            record["jpeg"] = {"quality": quality, "subsampling": subsampling}
        return np.array(image), record


def compressed(image: Image.Image, quality: int, subsampling: str) -> Image.Image:
    """The image after a round trip through JPEG; subsampling of the colours "4:4:4" (none) or "4:2:0"."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=_SUBSAMPLING[subsampling])
    return Image.open(buffer).convert("RGB")


def _recoloured(image: Image.Image, factors: np.ndarray) -> Image.Image:
    """Brightness, contrast and saturation times a factor each."""
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        image = enhance(image).enhance(float(factor))
    return image


def _there_and_back(image: Image.Image, scale: float) -> Image.Image:
    """As a copy of smaller size that was enlarged again."""
    smaller = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(smaller, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
