"""Examples with drawn marks: an image that follows from photo and marks to the last level, and a mask that is exact."""

import json
from collections import Counter

import numpy as np
import pytest

from data import watermark_synthesis
from data.blending import composite, to_uint8
from data.errors import DataError
from data.marks import LAYOUTS, Mark
from data.watermark_synthesis import Example, WatermarkSynthesis

PLAIN = {"colour_p": 0, "rescale_p": 0, "blur_p": 0, "noise_p": 0, "jpeg_p": 0, "scene_text_p": 0, "clean_p": 0}
PHOTO = np.random.default_rng(0).integers(60, 120, (96, 128, 3), dtype=np.uint8)


def synthesis(**settings) -> WatermarkSynthesis:
    """Without distortions, signs and clean photos, unless it is told otherwise."""
    return WatermarkSynthesis(**{"fonts": ["matplotlib"], "scripts": ["latin", "cyrillic"], **PLAIN, **settings})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, 0, 0])


def square(left: int, level: int = 255, height: int = 96, width: int = 128) -> Mark:
    """A mark whose coverage is 0.75 on 20 x 20 pixels with a rim of 0.25 around."""
    coverage = np.zeros((height, width), np.float32)
    coverage[19:41, left - 1 : left + 21] = 0.25
    coverage[20:40, left : left + 20] = 0.75
    return Mark(coverage, np.full((height, width, 3), level, np.float32), {"left": left})


@pytest.fixture
def drawn(monkeypatch):
    """Marks that are given out in turn in place of drawn ones, the last of them for ever; counts the calls."""
    marks = [square(30)]
    calls = []

    def draw(rng, height, width, **settings):
        calls.append(settings)
        rng.random()
        return marks.pop(0) if len(marks) > 1 else marks[0]

    monkeypatch.setattr(watermark_synthesis, "draw_mark", draw)
    draw.marks, draw.calls = marks, calls
    return draw


# The mask


@pytest.mark.parametrize("opacity", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_faint_mark_has_the_mask_of_a_strong_one(opacity):
    for seed in range(4):
        faint = synthesis(opacity=[opacity, opacity], least_visible=0)(PHOTO, rng(seed))
        strong = synthesis(opacity=[0.9, 0.9], least_visible=0)(PHOTO, rng(seed))
        assert faint.mask.any()
        np.testing.assert_array_equal(faint.mask, strong.mask)


def test_the_mask_is_the_coverage_of_all_marks_and_the_image_has_them_one_over_another(drawn):
    drawn.marks[:] = [square(30, 255), square(40, 0)]
    image, mask, record = synthesis(several_p=1, num_marks=2, blend_p=0)(PHOTO, rng())
    first, second = (mark["opacity"] for mark in record["marks"])
    below = to_uint8(composite(PHOTO, np.array([255] * 3), first * square(30).coverage))
    expected = to_uint8(composite(below, np.array([0] * 3), second * square(40).coverage))
    np.testing.assert_array_equal(image, expected)
    inside = np.zeros((96, 128), np.uint8)
    inside[20:40, 30:60] = 1
    np.testing.assert_array_equal(mask, inside)
    assert [mark["left"] for mark in record["marks"]] == [30, 40]


def test_mask_rules(drawn):
    assert synthesis()(PHOTO, rng()).mask.sum() == 20 * 20
    assert synthesis(mask_rule="any")(PHOTO, rng()).mask.sum() == 22 * 22
    half_dark = PHOTO.copy()
    half_dark[:30] = 255  # the white mark does not show there
    visible = synthesis(mask_rule="alpha_visible", blend_p=0)(half_dark, rng())
    assert visible.mask[20:30].sum() == 0 and visible.mask[30:40].sum() == 10 * 20


def test_distortions_change_the_image_alone():
    plain, spoilt = synthesis(), synthesis(colour_p=1, rescale_p=1, blur_p=1, noise_p=1, jpeg_p=1)
    for seed in range(3):
        a, b = plain(PHOTO, rng(seed)), spoilt(PHOTO, rng(seed))
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.record["marks"] == b.record["marks"] and not np.array_equal(a.image, b.image)
        assert a.record["distortions"] == {} and set(b.record["distortions"]) == {
            *("colour", "rescale", "blur", "noise", "jpeg")
        }


def test_signs_of_the_scene_are_in_the_image_and_not_in_the_mask():
    image, mask, record = synthesis(scene_text_p=1, clean_p=1)(PHOTO, rng())
    assert record["signs"] and record["clean"] and record["marks"] == []
    assert not mask.any() and not np.array_equal(image, PHOTO)


def test_without_signs_the_marks_are_the_same():
    with_signs, without = (synthesis(scene_text_p=p, least_visible=0)(PHOTO, rng(1)) for p in (1, 0))
    np.testing.assert_array_equal(with_signs.mask, without.mask)
    assert with_signs.record["signs"] and not without.record["signs"]


# What can be seen


def test_a_mark_that_cannot_be_seen_is_drawn_again_with_the_same_opacity(drawn):
    snow = np.full((96, 128, 3), 255, np.uint8)
    drawn.marks[:] = [square(30, 255), square(40, 253), square(50, 0)]
    record = synthesis(blend_p=0)(snow, rng()).record
    assert [mark["left"] for mark in record["marks"]] == [50] and record["left_out"] == 0
    assert record["marks"][0]["opacity"] == synthesis(blend_p=0)(PHOTO, rng()).record["marks"][0]["opacity"]


def test_what_never_shows_is_left_out_and_the_record_says_so(drawn):
    snow = np.full((96, 128, 3), 255, np.uint8)
    image, mask, record = synthesis(blend_p=0)(snow, rng())
    assert len(drawn.calls) == 8
    assert record["clean"] and record["left_out"] == 1
    assert not mask.any() and np.array_equal(image, snow)


def test_a_mark_that_covers_too_little_is_left_out(drawn):
    assert synthesis(least_mask=0.04)(PHOTO, rng()).record["left_out"] == 1  # 400 of 12288 pixels are 0.0326
    assert synthesis(least_mask=0.03)(PHOTO, rng()).record["left_out"] == 0


# Shares


def records(count: int, **settings) -> list[dict]:
    draw = synthesis(**settings)
    return [draw(PHOTO, rng(seed)).record for seed in range(count)]


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_share_of_clean_photos(drawn, share):
    clean = [record["clean"] for record in records(80, clean_p=share)]
    assert np.mean(clean) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_half_of_the_marks_are_faint(drawn):
    opacities = np.array([record["marks"][0]["opacity"] for record in records(120)])
    assert opacities.min() >= 0.1 and opacities.max() <= 0.9
    assert np.mean(opacities < 0.4) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("interval", [(0.1, 0.3), (0.5, 0.9), (0.4, 0.4)])
def test_an_opacity_range_on_one_side_of_the_limit_is_kept(drawn, interval):
    low, high = interval
    opacities = [record["marks"][0]["opacity"] for record in records(30, opacity=interval, least_visible=0)]
    assert all(low <= opacity <= high for opacity in opacities)
    assert np.ptp(opacities) > 0.8 * (high - low) - 1e-9


def test_number_of_marks(drawn):
    def counts(**settings) -> set[int]:
        return {len(record["marks"]) for record in records(30, **settings)}

    assert counts(several_p=0) == {1}
    assert counts(several_p=1) == {2, 3}
    assert counts(several_p=1, num_marks=1) == {1}
    assert counts() == {1, 2, 3}


def test_blend_modes(drawn):
    def modes(share: float) -> Counter:
        return Counter(record["marks"][0]["mode"] for record in records(80, blend_p=share, least_visible=0))

    assert set(modes(0)) == {"normal"}
    assert set(modes(1)) == {"multiply", "screen", "overlay"}
    assert modes(0.15)["normal"] == pytest.approx(68, abs=10)


# The example


def test_the_same_photo_and_generator_give_the_same_example():
    draw, settings = synthesis, {"clean_p": 0.1, "scene_text_p": 0.5, "several_p": 0.5, "jpeg_p": 1, "noise_p": 1}
    before = PHOTO.copy()
    for seed in range(4):
        one, other = draw(**settings)(PHOTO, rng(seed)), draw(**settings)(PHOTO, rng(seed))
        assert isinstance(one, Example)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)
        assert json.loads(json.dumps(one.record)) == one.record == other.record
    np.testing.assert_array_equal(PHOTO, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_a_mask_and_is_in_the_record(layout):
    image, mask, record = synthesis(layouts=[layout])(PHOTO, rng(2))
    assert image.shape == PHOTO.shape and image.dtype == mask.dtype == np.uint8 and mask.shape == PHOTO.shape[:2]
    assert set(np.unique(mask)) == {0, 1}
    assert (image == PHOTO)[mask == 0].mean() > 0.5  # away from the mark the photo is untouched
    assert record["marks"][0]["layout"] == layout and record["marks"][0]["script"] in ("latin", "cyrillic")


def test_settings_reach_the_drawing(drawn):
    synthesis(colours={"white": 1}, styles=["plain"], size=[0.1, 0.2], angle=[0, 10])(PHOTO, rng())
    settings = drawn.calls[0]
    assert settings["colours"] == {"white": 1.0} and settings["styles"] == {"plain": 1.0}
    assert settings["size"] == (0.1, 0.2) and settings["angle"] == (0.0, 10.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_p": 1.5}, "clean_p must be a number from 0 to 1, got 1.5"),
        ({"opacity": [0.9, 0.1]}, r"opacity must be \[low, high\], from 0 to 1, got \[0.9, 0.1\]"),
        ({"num_marks": 0}, "num_marks must be a whole number of at least 1, got 0"),
        ({"layouts": ["middle"]}, r"layouts must be a list of some of corner, .*, or a share for each, got .*"),
        ({"scripts": []}, "scripts must be .*"),
        ({"colours": {"white": 0}}, "colours must have a share above 0, got {'white': 0}"),
        ({"styles": {"plain": -1}}, "styles.plain must be a number of at least 0, got -1"),
        ({"mask_rule": "alpha"}, "mask_rule must be one of half, any, alpha_visible, got 'alpha'"),
        ({"jpeg_quality": [50, 101]}, "jpeg_quality must be .*"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        synthesis(**settings)


def test_unknown_settings_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'jpg_p'"):
        synthesis(jpg_p=1)


def test_a_script_without_font_is_refused_at_once():
    with pytest.raises(DataError, match="can write korean"):
        synthesis(scripts=["latin", "korean"])
