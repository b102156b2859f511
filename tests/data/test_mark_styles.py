import numpy as np
import pytest
from PIL import Image

from data.fonts import FontBook
from data.mark_layouts import SCALE, box_average, line
from data.mark_styles import COLOURS, STYLES, fill_colour, flatten, shown, styled_layers

FONT = next(file for file in FontBook(["matplotlib"]).files if file.endswith("DejaVuSans-Bold.ttf"))
GREY = (120, 120, 120)


def layers(style, seed=0, degrees=0.0):
    return styled_layers(np.random.default_rng(seed), line("Mark"), FONT, 80, degrees, style, GREY)


def test_colours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert min(fill_colour(rng, "white")) >= 235
        assert max(fill_colour(rng, "black")) <= 20
        assert len(set(fill_colour(rng, "grey"))) == 1
        assert np.ptp(fill_colour(rng, "hue")) >= 60
    assert sum(COLOURS.values()) == pytest.approx(1)


@pytest.mark.parametrize("style", ["outlined", "shadow", "emboss"])
@pytest.mark.parametrize("degrees", [0.0, 33.0, 90.0])
def test_what_a_style_adds_is_part_of_what_is_painted(style, degrees):
    for seed in range(6):
        drawn = layers(style, seed, degrees)
        if len(drawn) == 1:
            continue  # hollow, below
        coverage, _ = flatten(shown(drawn, phase=(0, 0)), [colour for _, colour in drawn])
        letters, _ = flatten(shown(drawn[-1:], phase=(0, 0)), [GREY])
        assert np.all(coverage >= letters - 0.02)
        assert (coverage >= 0.5).sum() > 1.05 * (letters >= 0.5).sum()
        # Nothing reaches the rim, where a shifted copy would come in again on the other side.
        for mask, _ in drawn:
            box = mask.getbbox()
            assert min(box[0], box[1], mask.width - box[2], mask.height - box[3]) >= (0 if style == "shadow" else 1)


def test_a_hollow_outline_leaves_the_letters_open():
    drawn = [layers("outlined", seed) for seed in range(30)]
    hollow = [one for one in drawn if len(one) == 1]
    assert 3 <= len(hollow) <= 20
    ((mask, colour),) = hollow[0]
    assert colour == GREY
    letters = layers("plain")[0][0]
    middle = np.asarray(letters)[1:-1, 1:-1] == 255
    rim = (mask.width - letters.width) // 2
    inner = np.asarray(mask)[rim + 1 : rim + 1 + middle.shape[0], rim + 1 : rim + 1 + middle.shape[1]]
    assert inner[middle].max() == 0


def test_an_upper_layer_hides_the_lower_one_exactly():
    lower = np.zeros((16, 16), dtype=np.uint8)
    lower[:, 2:11] = 255
    upper = np.zeros((16, 16), dtype=np.uint8)
    upper[:, 5:16] = 255
    pair = [(Image.fromarray(lower), (200, 0, 0)), (Image.fromarray(upper), (0, 100, 0))]
    shares = shown(pair, phase=(0, 0))
    np.testing.assert_allclose(shares[0, 0], [0.5, 0.25, 0, 0], atol=1e-6)
    np.testing.assert_allclose(shares[1, 0], [0, 0.75, 1, 1], atol=1e-6)
    coverage, colour = flatten(shares, [rgb for _, rgb in pair])
    np.testing.assert_allclose(coverage[0], [0.5, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(colour[0], [[200, 0, 0], [50, 75, 0], [0, 100, 0], [0, 100, 0]], atol=1e-4)


@pytest.mark.parametrize("phase", [(0, 0), (3, 1)])
def test_the_phase_moves_by_fine_pixels(phase):
    mask = np.random.default_rng(1).integers(0, 256, (10, 13), dtype=np.uint8)
    padded = np.zeros((16, 16), dtype=np.uint8)
    padded[phase[1] : phase[1] + 10, phase[0] : phase[0] + 13] = mask
    rows, columns = -(-(10 + phase[1]) // SCALE), -(-(13 + phase[0]) // SCALE)
    expected = box_average(Image.fromarray(padded))[:rows, :columns]
    np.testing.assert_array_equal(shown([(Image.fromarray(mask), GREY)], phase=phase)[0], expected)


def test_every_style_is_known():
    assert {style: len(layers(style)) > 0 for style in STYLES} == dict.fromkeys(STYLES, True)
