import collections

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.errors import DataError
from data.fonts import FontBook
from data.mark_layouts import SCALE, box_average, load_font
from data.mark_styles import COLOURS, STYLES
from data.mark_texts import SCRIPTS
from data.marks import LAYOUTS, draw_mark

FONTS = FontBook()


def mark(seed, height=96, width=128, **settings):
    return draw_mark(np.random.default_rng(seed), height, width, **{"fonts": FONTS, **settings})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_layout_in_every_script(layout, script):
    for seed, style in enumerate(STYLES):
        drawn = mark(seed, layouts=[layout], scripts=[script], styles=[style])
        assert drawn.coverage.shape == (96, 128) and drawn.coverage.dtype == np.float32
        assert drawn.colour.shape == (96, 128, 3) and drawn.colour.dtype == np.float32
        assert drawn.coverage.min() >= 0 and drawn.coverage.max() <= 1
        assert drawn.colour.min() >= 0 and drawn.colour.max() <= 255.01
        assert np.count_nonzero(drawn.coverage >= 0.5) >= 0.001 * 96 * 128
        assert (drawn.info["layout"], drawn.info["script"], drawn.info["style"]) == (layout, script, style)


def test_the_same_generator_gives_the_same_mark():
    for seed in range(5):
        one, two = mark(seed), mark(seed)
        assert one.info == two.info
        assert np.array_equal(one.coverage, two.coverage) and np.array_equal(one.colour, two.colour)


def test_coverage_is_the_box_average_of_the_text_at_four_times_the_size():
    drawn = mark(3, 120, 200, layouts=["centre"], styles=["plain"], scripts=["latin"], size=(0.2, 0.2), angle=(0, 0))
    path = next(file for file in FONTS.files if file.endswith(drawn.info["font"]))
    font = load_font(path, round(SCALE * drawn.info["size_px"]))
    left, top, right, bottom = font.getbbox(drawn.info["text"], anchor="ls")
    rows, columns = (np.flatnonzero(drawn.coverage.any(axis=axis)) for axis in (1, 0))
    ink = drawn.coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert rows[0] > 0 and rows[-1] < 119 and columns[0] > 0 and columns[-1] < 199  # nothing cut

    def average(x, y):
        size = [-(-(length + 2 * SCALE) // SCALE) * SCALE for length in (right - left, bottom - top)]
        image = Image.new("L", size)
        ImageDraw.Draw(image).text((x - left, y - top), drawn.info["text"], fill=255, font=font, anchor="ls")
        pixels = box_average(image)
        rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
        return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    candidates = [average(x, y) for x in range(SCALE) for y in range(SCALE)]
    assert any(candidate.shape == ink.shape and np.array_equal(candidate, ink) for candidate in candidates)


def test_a_plain_mark_has_one_colour():
    drawn = mark(1, styles=["plain"])
    assert np.all(drawn.colour == np.array(drawn.info["rgb"], dtype=np.float32))


@pytest.mark.parametrize(
    "shape", [(16, 16), (16, 300), (400, 16), (17, 33), (600, 400)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
def test_any_size_of_image(shape):
    for seed in range(10 if shape[0] < 600 else 3):
        drawn = mark(seed, *shape)
        assert drawn.coverage.shape == shape
        assert np.count_nonzero(drawn.coverage >= 0.5) >= max(1, 0.001 * shape[0] * shape[1])


def test_text_that_a_font_lacks_is_never_drawn():
    for seed in range(25):
        info = mark(seed).info
        path = next(file for file in FONTS.files if file.endswith("/" + info["font"]))
        assert FONTS.covers(path, info["text"].replace("\n", ""))


def test_a_script_without_a_font_is_an_error():
    with pytest.raises(DataError, match="can write korean"):
        mark(0, fonts=FontBook(["font_roboto"]), scripts=["korean"])


def test_shares_are_kept():
    rng = np.random.default_rng(0)
    drawn = [draw_mark(rng, 48, 48, fonts=FONTS, scripts={"latin": 3, "cyrillic": 1}).info for _ in range(200)]
    for key, shares in {
        "colour": COLOURS,
        "script": {"latin": 0.75, "cyrillic": 0.25},
        "layout": dict.fromkeys(LAYOUTS, 1 / 7),
        "style": STYLES,
    }.items():
        counts = collections.Counter(info[key] for info in drawn)
        assert {name: pytest.approx(share, abs=0.11) for name, share in shares.items()} == {
            name: counts[name] / 200 for name in shares
        }
    free = [info["angle"] for info in drawn if info["layout"] in ("corner", "centre", "two_line", "stamp")]
    assert 0.4 < free.count(0) / len(free) < 0.6
    assert 0.1 < sum(abs(angle) == 45 for angle in free) / len(free) < 0.3


def test_angles_stay_in_their_range():
    for seed in range(30):
        layouts = ["corner", "centre", "diagonal_tile", "staggered_tile", "two_line", "stamp"]
        assert 10 <= mark(seed, 48, 48, layouts=layouts, angle=(10, 20)).info["angle"] <= 20


def test_tilings_fill_the_image_and_do_not_overlap():
    for seed in range(6):
        drawn = mark(seed, 256, 256, layouts=["diagonal_tile"], styles=["plain"], size=(0.05, 0.06))
        quarters = drawn.coverage.reshape(2, 128, 2, 128).sum(axis=(1, 3))
        assert quarters.min() > 0.4 * quarters.max()
        assert abs(drawn.info["angle"]) > 5
        # Overlapping text would merge into large solid areas.
        assert (drawn.coverage >= 0.5).mean() < 0.45


def test_a_corner_mark_stands_in_a_corner():
    for seed in range(10):
        drawn = mark(seed, 200, 300, layouts=["corner"], styles=["plain"], size=(0.05, 0.06), angle=(0, 0))
        rows, columns = (np.flatnonzero(drawn.coverage.any(axis=axis)) for axis in (1, 0))
        assert min(rows[0], 199 - rows[-1]) < 20 and min(columns[0], 299 - columns[-1]) < 20


def test_names_that_do_not_exist():
    for setting in ("scripts", "layouts", "styles", "colours"):
        with pytest.raises(ValueError, match=f"{setting} must be of .*, got tartan"):
            mark(0, **{setting: ["tartan"]})
    with pytest.raises(ValueError, match="layouts must be of .*, got none"):
        mark(0, layouts=[])


def test_marks_that_cannot_be_seen_are_an_error(monkeypatch):
    monkeypatch.setattr("data.marks._VISIBLE_SHARE", 1.0)
    with pytest.raises(DataError, match="could be seen on an image of 20 x 16 pixels"):
        mark(0, 16, 20)
