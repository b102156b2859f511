"""Drawing of text watermarks: how much of each pixel a mark covers, and in which colour. Opacity plays no part here.

Source: the classic recipe of visible text marks, with one difference. Coverage is drawn at four times the size and
averaged over 4 x 4 blocks, apart from opacity, so that a mask taken from it (coverage >= 0.5) is the same for a mark
that can hardly be seen and for an opaque one.

Decisions that are not obvious
* A mark is flattened to one coverage, the union of all that it paints (outline and shadow too), and one colour for
  each pixel. Within a mark, layers hide what is under them at the fine grid, not after averaging.
* Size is drawn uniformly in its logarithm: most marks on photos are small.
* Only the text is drawn at four times the size, never the whole image; tiles share one drawing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.fonts import FontBook
from data.mark_layouts import SCALE, Block, Border, ink_box, line, stack, tile_centres, two_lines
from data.mark_styles import COLOURS, STYLES, fill_colour, flatten, shown, styled_layers
from data.mark_texts import SCRIPTS, draw_text

Shares = Sequence[str] | Mapping[str, float]
"""Names, each with the same chance, or name -> share."""

LAYOUTS = ("corner", "centre", "diagonal_tile", "staggered_tile", "two_line", "vertical", "stamp")

_STACKED = ("chinese", "japanese", "korean")
# Under this, letters are no longer letters.
_LEAST_SIZE_PX = {"latin": 7, "cyrillic": 7, "korean": 9, "chinese": 10, "japanese": 10}
_MEASURE_PX = 64
_CUT_SHARE = 0.2  # of the marks may be larger than the image
_VISIBLE_SHARE = 0.001  # of the image's pixels
_MASKED_SHARE = 0.5  # of the paint
_ATTEMPTS = 16


@dataclass(frozen=True)
class Mark:
    """A mark on an image of (H, W).

    Attributes:
        coverage: (H, W) float32 in [0, 1], how much of the pixel is painted.
        colour: (H, W, 3) float32, RGB in 0 ... 255; its value matters where coverage is above 0.
        info: layout, style, script, kind, text, font (file name), size_px, angle (degrees, counter-clockwise), colour
            (name) and rgb (of the letters): plain values for a record.
    """

    coverage: np.ndarray
    colour: np.ndarray
    info: dict[str, Any]


def draw_mark(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    fonts: FontBook,
    scripts: Shares = SCRIPTS,
    layouts: Shares = LAYOUTS,
    styles: Shares = STYLES,
    colours: Shares = COLOURS,
    size: tuple[float, float] = (0.03, 0.3),
    angle: tuple[float, float] = (-90.0, 90.0),
) -> Mark:
    """One text watermark. The same generator state gives the same mark.

    Args:
        height, width: size of the image, pixels.
        scripts, layouts, styles, colours: names of `SCRIPTS`, `LAYOUTS`, `STYLES`, `COLOURS`, or name -> share.
        size: font size, least and most, as a share of the shorter side. Smaller where the text would not fit, larger
            where letters of that size could not be seen.
        angle: least and most, degrees, counter-clockwise. Half of the marks are level and a fifth at 45 degrees, if
            the range has these; the others are anywhere in it. A diagonal tiling is never level; a vertical mark is
            at 0 (stacked characters) or a quarter turn, whatever the range.

    Raises:
        ValueError: a name that does not exist.
        DataError: no font can write the script, or each of several marks came out too thin to be seen.
    """
    for attempt in range(_ATTEMPTS):
        # What did not show is tried anew, larger from the third time on.
        enlarge = 1.25 ** max(0, attempt - 1)
        names = {
            "script": _pick(rng, "scripts", scripts, SCRIPTS),
            "layout": _pick(rng, "layouts", layouts, LAYOUTS),
            "style": _pick(rng, "styles", styles, STYLES),
            "colour": _pick(rng, "colours", colours, tuple(COLOURS)),
        }
        least, most = (math.log(share * min(height, width) * enlarge) for share in size)
        size_px = math.exp(rng.uniform(least, most))
        mark = _draw(rng, (height, width), fonts, size_px, angle, **names)
        if _shows(mark.coverage):
            return mark
    raise DataError(
        f"none of {_ATTEMPTS} marks could be seen on an image of {width} x {height} pixels: "
        f"larger images, a larger data.synthesis.size, or bolder fonts"
    )


def _shows(coverage: np.ndarray) -> bool:
    """Whether the mask of a mark, coverage >= 0.5, has pixels enough, and most of what is painted."""
    inside = coverage >= 0.5
    enough = np.count_nonzero(inside) >= max(1, _VISIBLE_SHARE * inside.size)
    return bool(enough and coverage[inside].sum() >= _MASKED_SHARE * coverage.sum())


def _pick(rng: np.random.Generator, setting: str, shares: Shares, known: Sequence[str]) -> str:
    names = list(shares)
    if not names or not set(names) <= set(known):
        raise ValueError(f"{setting} must be of {', '.join(known)}, got {', '.join(map(str, names)) or 'none'}")
    if not isinstance(shares, Mapping):
        return names[rng.integers(len(names))]
    weights = np.array(list(shares.values()), dtype=np.float64)
    return names[rng.choice(len(names), p=weights / weights.sum())]


def _draw(
    rng: np.random.Generator,
    shape: tuple[int, int],
    fonts: FontBook,
    size_px: float,
    angle: tuple[float, float],
    *,
    script: str,
    layout: str,
    style: str,
    colour: str,
) -> Mark:
    font = fonts.choose(rng, script)
    block, text, kind = _compose(rng, layout, script, font, fonts)
    degrees = _angle(rng, layout, block, angle)
    least = _LEAST_SIZE_PX[script]
    size_px = max(least, min(max(size_px, least), _largest(rng, block, font, layout, degrees, shape)))
    size = round(SCALE * size_px)
    rgb = fill_colour(rng, colour)

    layers = styled_layers(rng, block, font, size, degrees, style, rgb)
    phase = int(rng.integers(SCALE)), int(rng.integers(SCALE))
    sprite = shown(layers, phase=phase)  # (layer, h, w)
    if layout.endswith("tile"):
        places = _tiles(rng, layout, shape, sprite.shape[1:], _extent(block, font, size), degrees)
    else:
        places = [_place(rng, layout, shape, sprite.shape[1:])]
    canvas = np.zeros((len(layers), *shape), dtype=np.float32)
    for left, top in places:
        _paste(canvas, sprite, left, top)

    coverage, colours = flatten(canvas, [layer_rgb for _, layer_rgb in layers])
    info = {"layout": layout, "style": style, "script": script, "kind": kind, "text": text, "font": Path(font).name}
    info |= {"size_px": size / SCALE, "angle": round(degrees, 2), "colour": colour, "rgb": list(rgb)}
    return Mark(coverage, colours, info)


def _text(
    rng: np.random.Generator, script: str, font: str, fonts: FontBook, kind: str | None = None
) -> tuple[str, str]:
    """A text of which the font has every glyph."""
    for _ in range(20):
        text, drawn = draw_text(rng, script, kind=kind)
        if fonts.covers(font, text):
            return text, drawn
    return str(rng.integers(10**3, 10**8)), "digits"  # which every font of the book has


def _compose(rng: np.random.Generator, layout: str, script: str, font: str, fonts: FontBook) -> tuple[Block, str, str]:
    """What is written and how it stands: block, text, kind of text."""
    text, kind = _text(rng, script, font, fonts)
    if layout == "vertical" and script in _STACKED and kind in ("words", "random"):
        return stack(font, text), text, kind
    block = line(text)
    if layout == "two_line" or (layout == "stamp" and rng.random() < 0.3):
        second = _text(rng, script, font, fonts, kind=None if rng.random() < 0.5 else "url")[0]
        align = 0.5 if layout == "stamp" else float(rng.choice([0.0, 0.5, 1.0]))
        block = two_lines(font, text, second, scale=rng.uniform(0.5, 1.0), align=align)
        text = f"{text}\n{second}"
    if layout == "stamp":
        shape = str(rng.choice(["rectangle", "rounded", "ellipse"]))
        block = Block(block.pieces, Border(shape, rng.uniform(0.15, 0.4), rng.uniform(0.05, 0.12)))
    return block, text, kind


def _angle(rng: np.random.Generator, layout: str, block: Block, angle: tuple[float, float]) -> float:
    least, most = angle
    if layout == "vertical":
        return 0.0 if len(block.pieces) > 1 else float(rng.choice([90.0, -90.0]))
    shares = {"level": 0.5, "diagonal": 0.2, "any": 0.3} if layout != "diagonal_tile" else {"diagonal": 0.5, "any": 0.5}
    fixed = {"level": [0.0], "diagonal": [45.0, -45.0], "any": []}[_pick(rng, "angle", shares, tuple(shares))]
    if inside := [degrees for degrees in fixed if least <= degrees <= most]:
        return float(rng.choice(inside))
    if layout == "diagonal_tile":
        # Of three draws the one nearest to the diagonal.
        return float(min(rng.uniform(least, most, size=3), key=lambda degrees: abs(abs(degrees) - 45)))
    return float(rng.uniform(least, most))


def _extent(block: Block, font: str, size: int) -> tuple[int, int]:
    left, top, right, bottom = ink_box(block, font, size)
    return right - left, bottom - top


def _largest(
    rng: np.random.Generator, block: Block, font: str, layout: str, degrees: float, shape: tuple[int, int]
) -> float:
    """The font size, pixels, with which the mark still fits; for some marks one with which the edges cut it."""
    height, width = shape
    across, down = (length / _MEASURE_PX for length in _extent(block, font, _MEASURE_PX))  # em
    if layout.endswith("tile"):
        return 0.8 * max(height, width) / across
    room = 1.5 if layout != "corner" and rng.random() < _CUT_SHARE else 0.94
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    return room * min(width / (across * cos + down * sin), height / (across * sin + down * cos))


def _place(
    rng: np.random.Generator, layout: str, shape: tuple[int, int], sprite_shape: tuple[int, int]
) -> tuple[int, int]:
    """Where the one drawing is put: its left and top pixel. What is larger than the image is cut on both sides."""
    margin = rng.uniform(0.01, 0.06) * min(shape)
    place = []
    for whole, part in zip(shape, sprite_shape, strict=True):
        free = whole - part
        if layout == "corner" and free >= 0:
            start = rng.choice([min(margin, free / 2), max(free - margin, free / 2)])
        elif layout == "centre":
            start = free / 2 + rng.uniform(-0.05, 0.05) * whole
        else:
            start = rng.uniform(min(0, free), max(0, free))
        place.append(round(start))
    return place[1], place[0]


def _tiles(
    rng: np.random.Generator,
    layout: str,
    shape: tuple[int, int],
    sprite_shape: tuple[int, int],
    extent: tuple[int, int],
    degrees: float,
) -> list[tuple[int, int]]:
    """Where the drawings of a tiling are put: a grid turned as they are and wide enough that none overlap."""
    across, down = (length / SCALE for length in extent)
    period = across * rng.uniform(1.15, 2.0) + 2, down * rng.uniform(1.3, 3.5) + 2
    phase = rng.random(), rng.random()
    centres = tile_centres(*shape, period=period, angle=degrees, stagger=layout == "staggered_tile", phase=phase)
    height, width = sprite_shape
    corners = np.rint(centres - (width / 2, height / 2)).astype(int)  # (N, 2): left, top
    seen = np.all((corners < shape[::-1]) & (corners > (-width, -height)), axis=1)
    return [(int(left), int(top)) for left, top in corners[seen]]


def _paste(canvas: np.ndarray, sprite: np.ndarray, left: int, top: int) -> None:
    """The sprite (layer, h, w) on the canvas (layer, H, W); where it meets another, the larger of the two."""
    height, width = canvas.shape[1:]
    y, x = max(0, -top), max(0, -left)
    view = canvas[:, max(0, top) : max(0, min(height, top + sprite.shape[1])), :]
    view = view[:, :, max(0, left) : max(0, min(width, left + sprite.shape[2]))]
    np.maximum(view, sprite[:, y : y + view.shape[1], x : x + view.shape[2]], out=view)
