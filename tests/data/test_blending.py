"""Blending: the formula to the last bit, rounding, Pillow's result, and masks that do not know the opacity."""

import numpy as np
import pytest
from PIL import Image

from data.blending import MODES, change_of, composite, mask_of, to_uint8, visible_share

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)
COVERAGE = RNG.integers(0, 256, (8, 9)) / 255


def test_normal_is_the_formula_to_the_last_bit():
    alpha = 0.3 * COVERAGE
    expected = alpha[..., None] * COLOUR.astype(float) + (1 - alpha[..., None]) * PHOTO.astype(float)
    result = composite(PHOTO, COLOUR, alpha)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("opacity", [0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_pillow_differs_by_one_level_at_most(opacity):
    layer = np.dstack([COLOUR, to_uint8(255 * opacity * COVERAGE)])
    theirs = Image.alpha_composite(Image.fromarray(PHOTO).convert("RGBA"), Image.fromarray(layer))
    ours = to_uint8(composite(PHOTO, COLOUR, opacity * COVERAGE))
    assert np.abs(ours.astype(int) - np.asarray(theirs.convert("RGB"))).max() <= 1


def test_alpha_zero_leaves_the_photo_and_alpha_one_the_colour():
    for mode in MODES:
        np.testing.assert_array_equal(composite(PHOTO, COLOUR, np.zeros((8, 9)), mode=mode), PHOTO)
    np.testing.assert_array_equal(composite(PHOTO, COLOUR, np.ones((8, 9))), COLOUR)


@pytest.mark.parametrize(
    ("mode", "blend"),
    [
        ("multiply", lambda i, w: i * w),
        ("screen", lambda i, w: i + w - i * w),
        ("overlay", lambda i, w: 2 * i * w if i <= 0.5 else 2 * (i + w - i * w) - 1),
    ],
)
def test_blend_modes_are_their_definition(mode, blend):
    result = composite(PHOTO, COLOUR, np.full((8, 9), 0.4), mode=mode) / 255
    expected = 0.4 * np.vectorize(blend)(PHOTO / 255, COLOUR / 255) + 0.6 * PHOTO / 255
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_one_colour_for_all_pixels():
    colour = np.array([200, 10, 30])
    np.testing.assert_array_equal(
        composite(PHOTO, colour, COVERAGE), composite(PHOTO, np.broadcast_to(colour, PHOTO.shape), COVERAGE)
    )


def test_halves_round_upwards_and_levels_stay_in_range():
    image = np.array([0.5, 1.5, 2.4999, 2.5, 254.5, -3.0, 300.0])
    assert to_uint8(image).tolist() == [1, 2, 2, 3, 255, 0, 255]


def test_masks_by_rule():
    coverage = np.array([[0.0, 0.01, 0.4999, 0.5, 1.0]])
    change = np.array([[9, 9, 9, 3, 4]])
    assert mask_of(coverage).tolist() == [[0, 0, 0, 1, 1]]
    assert mask_of(coverage, rule="any").tolist() == [[0, 1, 1, 1, 1]]
    assert mask_of(coverage, change, rule="alpha_visible").tolist() == [[0, 0, 0, 0, 1]]
    assert mask_of(coverage).dtype == np.uint8


def test_visible_share_looks_at_the_mask_alone():
    photo, image = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 100, np.uint8)
    image[0, 0, 2], image[0, 1, 0], image[1, 1] = 96, 103, 200  # 4 down, 3 up, far but outside
    change = change_of(photo, image)
    assert change.tolist() == [[4, 3], [0, 100]]
    assert visible_share(change, np.array([[1, 1], [0, 0]])) == 0.5
    assert visible_share(change, np.zeros((2, 2))) == 0.0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="^mode must be one of normal, multiply, screen, overlay, got 'add'$"):
        composite(PHOTO, COLOUR, COVERAGE, mode="add")
    with pytest.raises(ValueError, match="^mask_rule must be one of half, any, alpha_visible, got 'alpha'$"):
        mask_of(COVERAGE, rule="alpha")
