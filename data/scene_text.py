"""Text and lines that belong to the scene: signs, labels, screens. Drawn before any mark, and never in a mask.

They teach that it is not writing that makes a watermark but writing laid over the picture: a sign is opaque, has a
plate of its own, and stands in perspective.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data.blending import to_uint8
from data.fonts import FontBook
from data.mark_layouts import load_font
from data.mark_texts import draw_text

_LETTER_SIZE = 40  # pixels, at which a sign is drawn before it is warped
_LONGEST = 14  # characters of a line
_SIZES = (0.15, 0.5)  # longer side of a sign, relative to the shorter side of the photo
_GRAPHIC_SHARE = 0.25  # of what is drawn: frames, bars and lines without text


def draw_scene_text(
    photo: np.ndarray, rng: np.random.Generator, *, fonts: FontBook, scripts: Sequence[str]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The photo with one to three signs, and what they say.

    Shape:
        uint8 `(H, W, 3)` -> uint8 `(H, W, 3)`
    """
    record = []
    for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])):
        if rng.random() < _GRAPHIC_SHARE:
            sign, drawn = _graphic(rng), {"text": None}
        else:
            sign, drawn = _sign(rng, fonts, scripts)
        photo = _place(photo, sign, rng)
        record.append(drawn)
    return photo, record


def perspective(corners: np.ndarray, width: float, height: float) -> list[float]:
    """The eight numbers of Pillow's PERSPECTIVE by which a rectangle appears with these corners.

    They take a point (x, y) of the result to ((a x + b y + c) / (g x + h y + 1), (d x + e y + f) / (g x + h y + 1)) of
    the rectangle.

    Args:
        corners: in the result, of the rectangle's upper left, upper right, lower right and lower left.

    Shape:
        `(4, 2)` as (x, y) -> 8 numbers
    """
    source = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    rows = []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return np.linalg.solve(np.array(rows), source.reshape(-1)).tolist()


def _sign(rng: np.random.Generator, fonts: FontBook, scripts: Sequence[str]) -> tuple[Image.Image, dict[str, Any]]:
    """A plate with one to three lines of text."""
    script = scripts[rng.integers(len(scripts))]
    path = fonts.choose(rng, script)
    font = load_font(path, _LETTER_SIZE)
    lines = [line for line in _texts(rng, script, int(rng.integers(1, 4))) if fonts.covers(path, line)]
    text = "\n".join(lines) or "?"
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    margin = rng.uniform(0.2, 0.9) * _LETTER_SIZE
    size = (int(right - left + 2 * margin), int(bottom - top + 2 * margin))
    plate, ink = _two_colours(rng)
    sign = Image.new("RGB", size, plate)
    draw = ImageDraw.Draw(sign)
    if rng.random() < 0.4:
        inset = int(margin / 3)
        box = (inset, inset, size[0] - 1 - inset, size[1] - 1 - inset)
        draw.rectangle(box, outline=ink, width=int(rng.integers(1, 5)))
    draw.multiline_text((margin - left, margin - top), text, ink, font, align="center")
    return sign, {"text": text, "script": script}


def _texts(rng: np.random.Generator, script: str, count: int) -> list[str]:
    return [draw_text(rng, script)[0][:_LONGEST].strip() for _ in range(count)]


def _graphic(rng: np.random.Generator) -> Image.Image:
    """A panel of stripes, bars or boxes, as of a window, a road sign or a chart."""
    width, height = int(rng.integers(60, 300)), int(rng.integers(60, 200))
    plate, ink = _two_colours(rng)
    panel = Image.new("RGB", (width, height), plate)
    draw = ImageDraw.Draw(panel)
    for _ in range(rng.integers(1, 7)):
        (x0, x1), (y0, y1) = sorted(rng.uniform(0, width, 2)), sorted(rng.uniform(0, height, 2))
        stroke = int(rng.integers(1, 9))
        if rng.random() < 0.5:
            draw.rectangle((x0, y0, x1, y1), outline=ink, width=stroke)
        else:
            draw.line((x0, y0, x1, y1) if rng.random() < 0.5 else (x0, y1, x1, y0), fill=ink, width=stroke)
    return panel


def _two_colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the plate and of what is on it, far enough apart to be read."""
    while True:
        plate, ink = rng.integers(0, 256, (2, 3))
        if rng.random() < 0.5:  # most signs are white or nearly black
            plate = np.full(3, rng.choice([rng.integers(0, 50), rng.integers(215, 256)]))
        if abs(plate.mean() - ink.mean()) > 60:
            return tuple(plate.tolist()), tuple(ink.tolist())


def _place(photo: np.ndarray, sign: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The photo with the sign in perspective somewhere in it, no sharper than the scene and lit from one side."""
    height, width = photo.shape[:2]
    longer = rng.uniform(*_SIZES) * min(height, width)
    scale = longer / max(sign.size)
    sign = sign.resize([max(2, round(side * scale)) for side in sign.size], Image.Resampling.BICUBIC, reducing_gap=2.0)
    half = np.array(sign.size) / 2
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    corners += rng.uniform(-0.25, 0.25, (4, 2)) * half  # up to there a quadrilateral stays convex
    angle = np.deg2rad(rng.normal(0, 12))
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    corners = corners @ turn + rng.uniform(0.1, 0.9, 2) * (width, height)
    low = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, (width, height))
    high = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, (width, height))
    if (high - low).min() < 1:
        return photo
    numbers = perspective(corners - low, *sign.size)
    size = tuple((high - low).tolist())
    layer = sign.convert("RGBA").convert("RGBa")  # colours times alpha: what is blurred gets no dark rim
    layer = layer.transform(size, Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BILINEAR)
    layer = np.asarray(layer.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8))), dtype=np.float64)  # (h, w, 4)
    light = np.linspace(*rng.uniform(0.7, 1.1, 2), size[0])[:, None]  # (w, 1)
    part = (slice(low[1], high[1]), slice(low[0], high[0]))
    photo = photo.copy()
    photo[part] = to_uint8(layer[..., :3] * light + (1 - layer[..., 3:] / 255) * photo[part])
    return photo
