"""What the letters of a mark look like: colour of the fill, outline, shadow, emboss, and the layers made one.

Layers are masks (L) of one size at the fine grid of data/mark_layouts.py, listed from the bottom up, each in one
colour.
"""

import colorsys

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from data.mark_layouts import SCALE, Block, box_average, paint

STYLES = {"plain": 0.55, "outlined": 0.2, "shadow": 0.15, "emboss": 0.1}
"""How letters are painted -> its share."""
COLOURS = {"white": 0.4, "black": 0.2, "grey": 0.1, "hue": 0.3}
"""Colour of the fill -> its share."""

Colour = tuple[int, int, int]
_HOLLOW_SHARE = 0.35  # of the outlined ones, only the outline is painted


def fill_colour(rng: np.random.Generator, name: str) -> Colour:
    if name == "hue":
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.5, 1))
        return round(255 * red), round(255 * green), round(255 * blue)
    least, most = {"white": (235, 255), "black": (0, 20), "grey": (90, 180)}[name]
    level = int(rng.integers(least, most + 1))
    return level, level, level


def styled_layers(
    rng: np.random.Generator, block: Block, font: str, size: int, degrees: float, style: str, fill: Colour
) -> list[tuple[Image.Image, Colour]]:
    """The layers of a block, turned by an angle.

    Args:
        size: font size in pixels of the fine grid.
        degrees: counter-clockwise. The direction of a shadow is that of the light and does not turn.
    """
    width = max(1, round(size * rng.uniform(0.03, 0.08)))
    blur = size * rng.uniform(0.0, 0.05)
    margin = {"plain": 0, "outlined": width, "emboss": width, "shadow": width + round(3 * blur)}[style] + 1

    def turned(stroke: int = 0) -> Image.Image:
        # Nearest: each pixel of the photo averages 16 of these anyway, and bilinear takes ten times as long.
        return paint(block, font, size, margin=margin, stroke=stroke).rotate(degrees, expand=True)

    letters = turned()
    contrast = _contrast(rng, fill)
    if style == "outlined":
        outer = turned(stroke=width)
        if rng.random() < _HOLLOW_SHARE:
            return [(ImageChops.subtract(outer, letters), fill)]
        return [(outer, contrast), (letters, fill)]
    if style == "shadow":
        shadow = ImageChops.offset(letters, width if rng.random() < 0.8 else -width, width)
        return [(_blurred(shadow, blur), contrast), (letters, fill)]
    if style == "emboss":
        light, dark = ImageChops.offset(letters, -width, -width), ImageChops.offset(letters, width, width)
        return [(light, (255, 255, 255)), (dark, (0, 0, 0)), (letters, fill)]
    return [(letters, fill)]


def _blurred(mask: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur, worked out on the coarse grid: what is smooth needs no finer one."""
    coarse = mask.reduce(SCALE).filter(ImageFilter.GaussianBlur(radius / SCALE))
    box = (0, 0, mask.width / SCALE, mask.height / SCALE)
    return coarse.resize(mask.size, Image.Resampling.BILINEAR, box=box)


def _contrast(rng: np.random.Generator, fill: Colour) -> Colour:
    """Dark beside a light fill, light beside a dark one."""
    luma = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    level = int(rng.integers(0, 60) if luma > 90 else rng.integers(200, 256))
    return level, level, level


def shown(layers: list[tuple[Image.Image, Colour]], *, phase: tuple[int, int]) -> np.ndarray:
    """How much of each pixel shows each layer, (layer, H, W) float32; their sum is what all of them paint.

    Args:
        phase: (x, y) in [0, SCALE), by how many fine pixels the masks begin right of and below a pixel's corner.
    """
    hidden: Image.Image | None = None
    averages = []
    for mask, _ in reversed(layers):
        width, height = (-(-(side + start) // SCALE) * SCALE for side, start in zip(mask.size, phase, strict=True))
        seen = mask if hidden is None else ImageChops.multiply(mask, ImageChops.invert(hidden))
        averages.append(box_average(seen.crop((-phase[0], -phase[1], width - phase[0], height - phase[1]))))
        hidden = mask if hidden is None else ImageChops.screen(hidden, mask)
    return np.stack(averages[::-1])


def flatten(shares: np.ndarray, colours: list[Colour]) -> tuple[np.ndarray, np.ndarray]:
    """Shares (layer, H, W) of the layers' colours as one coverage (H, W) and one colour (H, W, 3), float32."""
    painted = shares.sum(axis=0)
    height, width = painted.shape
    colour = np.empty((height, width * 3), dtype=np.float32)
    colour[:] = np.tile(np.array(colours[-1], dtype=np.float32), width)
    if len(colours) > 1:
        where = np.flatnonzero(painted)
        weights = shares.reshape(len(colours), -1)[:, where] / painted.ravel()[where]  # (layer, pixel)
        colour.reshape(-1, 3)[where] = weights.T @ np.array(colours, dtype=np.float32)
    return np.minimum(painted, 1), colour.reshape(height, width, 3)
