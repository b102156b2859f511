"""Where the letters of a mark stand: lines, stacks and stamps as masks at four times the size, and grids of tiles.

Masks are Pillow images of mode L, `SCALE` pixels for each pixel of the photo. Lengths within a `Block` are in em (the
font size is 1), so that a block can be measured first and drawn in the size that fits.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 4
Box = tuple[int, int, int, int]  # left, top, right, bottom

_MEASURE_PX = 256
_LINE_EM = 1.25
_CELL_EM = 1.08
# Drawn lying on their side where Chinese, Japanese and Korean run from top to bottom.
_TURNED = frozenset("ー～—–-…()（）「」")


@dataclass(frozen=True)
class Piece:
    """A run of characters with its baseline's left end at (x, y), y downwards."""

    text: str
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    turned: bool = False


@dataclass(frozen=True)
class Border:
    shape: str  # rectangle, rounded or ellipse
    padding: float
    thickness: float


@dataclass(frozen=True)
class Block:
    pieces: tuple[Piece, ...]
    border: Border | None = None


@functools.lru_cache(maxsize=64)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of Pillow, so that a seed gives the same picture everywhere.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def line(text: str) -> Block:
    return Block((Piece(text),))


def two_lines(path: str, first: str, second: str, *, scale: float, align: float) -> Block:
    """Two lines, the second `scale` times as large. `align`: 0 left, 0.5 centred, 1 right."""
    font = load_font(path, _MEASURE_PX)
    widths = [font.getlength(first) / _MEASURE_PX, scale * font.getlength(second) / _MEASURE_PX]
    xs = [align * (max(widths) - width) for width in widths]
    return Block((Piece(first, xs[0]), Piece(second, xs[1], (_LINE_EM + scale * _LINE_EM) / 2, scale)))


def stack(path: str, text: str) -> Block:
    """Characters under each other, each centred."""
    font = load_font(path, _MEASURE_PX)
    return Block(
        tuple(
            Piece(letter, -font.getlength(letter) / _MEASURE_PX / 2, _CELL_EM * row, turned=letter in _TURNED)
            for row, letter in enumerate(text)
            if not letter.isspace()
        )
    )


@functools.lru_cache(maxsize=16)
def ink_box(block: Block, path: str, size: int) -> Box:
    """The pixels that the block may paint in a font of `size` pixels, border included."""
    lefts, tops, rights, bottoms = zip(*(_piece_box(piece, path, size) for piece in block.pieces), strict=True)
    box = min(lefts), min(tops), max(rights), max(bottoms)
    return _border_box(box, block.border, size) if block.border else box


def paint(block: Block, path: str, size: int, *, margin: int, stroke: int = 0) -> Image.Image:
    """The block as a mask (L), with `margin` empty pixels around; every edge moved out by `stroke` <= margin."""
    left, top, right, bottom = _grown(ink_box(block, path, size), margin)
    image = Image.new("L", (right - left, bottom - top))
    for piece in block.pieces:
        _paint_piece(image, piece, path, size, (left, top), stroke)
    if block.border:
        thickness = max(1, round(block.border.thickness * size)) + 2 * stroke
        box = _grown((margin, margin, image.width - margin - 1, image.height - margin - 1), stroke)
        draw = ImageDraw.Draw(image)
        if block.border.shape == "ellipse":
            draw.ellipse(box, outline=255, width=thickness)
        else:
            radius = round(0.35 * size) if block.border.shape == "rounded" else 0
            draw.rounded_rectangle(box, radius, outline=255, width=thickness)
    return image


def _grown(box: Box, by: int) -> Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _piece_font(piece: Piece, path: str, size: int) -> ImageFont.FreeTypeFont:
    return load_font(path, max(1, round(piece.scale * size)))


def _piece_box(piece: Piece, path: str, size: int) -> Box:
    left, top, right, bottom = _piece_font(piece, path, size).getbbox(piece.text, anchor="ls")
    x, y = round(piece.x * size), round(piece.y * size)
    box = math.floor(left) + x, math.floor(top) + y, math.ceil(right) + x, math.ceil(bottom) + y
    if not piece.turned:
        return box
    # A quarter turn about the middle of the cell.
    half = max(box[2] - box[0], box[3] - box[1]) // 2 + 1
    return -half, y - round(0.38 * size) - half, half, y - round(0.38 * size) + half


def _paint_piece(image: Image.Image, piece: Piece, path: str, size: int, origin: tuple[int, int], stroke: int) -> None:
    font = _piece_font(piece, path, size)
    if not piece.turned:
        place = round(piece.x * size) - origin[0], round(piece.y * size) - origin[1]
        ImageDraw.Draw(image).text(place, piece.text, fill=255, font=font, anchor="ls", stroke_width=stroke)
        return
    left, top, right, bottom = _grown(_piece_box(piece, path, size), stroke)
    cell = Image.new("L", (right - left, bottom - top))
    ink = font.getbbox(piece.text, anchor="ls")
    place = (cell.width - ink[0] - ink[2]) / 2, (cell.height - ink[1] - ink[3]) / 2
    ImageDraw.Draw(cell).text(place, piece.text, fill=255, font=font, anchor="ls", stroke_width=stroke)
    image.paste(cell.transpose(Image.Transpose.ROTATE_270), (left - origin[0], top - origin[1]))


def _border_box(box: Box, border: Border, size: int) -> Box:
    left, top, right, bottom = box
    if border.shape == "ellipse":
        # An ellipse through the corners of a box is sqrt(2) times as wide and high.
        dx, dy = ((math.sqrt(2) - 1) / 2 * (end - start) for start, end in ((left, right), (top, bottom)))
        left, top, right, bottom = round(left - dx), round(top - dy), round(right + dx), round(bottom + dy)
    return _grown((left, top, right, bottom), round((border.padding + border.thickness) * size))


def tile_centres(
    height: int, width: int, *, period: tuple[float, float], angle: float, stagger: bool, phase: tuple[float, float]
) -> np.ndarray:
    """Centres (x, y) of tiles that cover an image, (N, 2) float, some of them outside.

    Args:
        period: distance from tile to tile along a row, and from row to row.
        angle: of the grid, degrees, counter-clockwise.
        stagger: every second row is moved by half a tile.
        phase: where the grid begins, each in [0, 1) of a period.
    """
    radius = math.hypot(height, width) / 2 + max(period)
    columns, rows = (np.arange(-math.ceil(radius / step) - 1, math.ceil(radius / step) + 2) for step in period)
    row, column = np.meshgrid(rows, columns, indexing="ij")
    along = (column + phase[0] + (0.5 * (row % 2) if stagger else 0.0)) * period[0]
    across = (row + phase[1]) * period[1]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x = width / 2 + along * cos + across * sin
    y = height / 2 - along * sin + across * cos
    return np.stack((x.ravel(), y.ravel()), axis=1)


def box_average(image: Image.Image) -> np.ndarray:
    """Mean over each `SCALE` x `SCALE` block of a mask, (H, W) float32 in [0, 1]. Sides are multiples of `SCALE`."""
    # Sums of 16 bytes are exact in float32.
    return np.asarray(image.convert("F").reduce(SCALE)) * np.float32(1 / 255)
