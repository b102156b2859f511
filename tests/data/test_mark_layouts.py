import numpy as np
import pytest
from PIL import Image

from data.fonts import FontBook
from data.mark_layouts import (
    SCALE,
    Block,
    Border,
    Piece,
    box_average,
    ink_box,
    line,
    load_font,
    paint,
    stack,
    tile_centres,
    two_lines,
)

FONT = next(file for file in FontBook(["matplotlib"]).files if file.endswith("DejaVuSans.ttf"))
NOTO = FontBook(["zhplot"]).files[0]


def test_box_average_is_the_exact_mean_of_each_block():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    expected = pixels.reshape(6, SCALE, 10, SCALE).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(box_average(Image.fromarray(pixels)), expected, atol=1e-6)


BLOCKS = {
    "line": line("Äjgy Ж"),
    "two_lines": two_lines(FONT, "first line", "second", scale=0.6, align=0.5),
    "stack": stack(FONT, "QWÄj"),
    "turned": Block((Piece("W"), Piece("—", 0.1, 1.1, turned=True))),
    **{shape: Block((Piece("Stamp"),), Border(shape, 0.3, 0.1)) for shape in ("rectangle", "rounded", "ellipse")},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("stroke", [0, 5])
def test_nothing_is_cut(name, stroke):
    block = BLOCKS[name]
    image = paint(block, FONT, 61, margin=8, stroke=stroke)
    left, top, right, bottom = ink_box(block, FONT, 61)
    assert image.size == (right - left + 16, bottom - top + 16)
    larger = paint(block, FONT, 61, margin=30, stroke=stroke)
    assert larger.getbbox() is not None
    # The same picture with more room has the same ink, and it keeps clear of the rim.
    assert np.array_equal(np.asarray(larger)[22:-22, 22:-22], np.asarray(image))
    ink = larger.getbbox()
    assert min(ink[0], ink[1], larger.width - ink[2], larger.height - ink[3]) >= 30 - stroke - 1


@pytest.mark.parametrize("name", BLOCKS)
def test_a_stroke_only_adds(name):
    thin, thick = (np.asarray(paint(BLOCKS[name], FONT, 61, margin=8, stroke=stroke)) for stroke in (0, 5))
    assert np.all(thick.astype(int) >= thin.astype(int) - 1)
    assert thick.sum() > 1.2 * thin.sum()


def test_a_stack_goes_down_and_a_line_goes_right():
    def extent(block):
        left, top, right, bottom = ink_box(block, NOTO, 40)
        return right - left, bottom - top

    across, down = extent(stack(NOTO, "版权所有"))
    assert down > 3 * across
    across, down = extent(line("版权所有"))
    assert across > 3 * down


def test_the_long_vowel_mark_is_turned_in_a_stack():
    block = stack(NOTO, "サー")
    bar = Block((block.pieces[1],))
    ink = paint(bar, NOTO, 80, margin=1).getbbox()
    assert ink[3] - ink[1] > 3 * (ink[2] - ink[0])


@pytest.mark.parametrize("angle", [0.0, 45.0, -30.0])
@pytest.mark.parametrize("stagger", [False, True])
def test_tiles_cover_the_image_on_a_turned_grid(angle, stagger):
    centres = tile_centres(100, 160, period=(30.0, 12.0), angle=angle, stagger=stagger, phase=(0.3, 0.6))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    along = centres @ (cos, -sin)  # y runs downwards
    across = centres @ (sin, cos)
    gaps = np.diff(np.unique(np.round(across, 6)))
    np.testing.assert_allclose(gaps, 12.0, atol=1e-4)
    row = np.isclose(across, across[len(across) // 2])
    np.testing.assert_allclose(np.diff(np.sort(along[row])), 30.0, atol=1e-4)
    # Each corner of the image has a tile nearby.
    for corner in ((0, 0), (160, 0), (0, 100), (160, 100)):
        assert np.hypot(*(centres - corner).T).min() < np.hypot(15, 6) + 1e-6
    # The next row begins half a tile further, or not.
    below = np.isclose(across, across[len(across) // 2] + 12.0)
    shift = (along[below].min() - along[row].min()) % 30.0
    assert np.isclose(shift, 15.0 if stagger else 0.0) or (not stagger and np.isclose(shift, 30.0))


def test_fonts_are_loaded_once_for_each_size():
    assert load_font(FONT, 33) is load_font(FONT, 33)
