"""Distortions: each alone, within its range, and none of them where its share is 0."""

import json

import numpy as np
import pytest
from PIL import Image

from data.distortions import Distortions, compressed

OFF = {"colour_p": 0, "rescale_p": 0, "blur_p": 0, "noise_p": 0, "jpeg_p": 0}
RNG = np.random.default_rng(0)
PICTURE = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
)


def test_nothing_happens_where_all_shares_are_zero():
    picture, record = Distortions(**OFF)(PICTURE, np.random.default_rng(0))
    np.testing.assert_array_equal(picture, PICTURE)
    assert record == {}


@pytest.mark.parametrize("name", ["colour", "rescale", "blur", "noise", "jpeg"])
def test_each_changes_the_picture_and_says_so(name):
    before = PICTURE.copy()
    picture, record = Distortions(**OFF | {f"{name}_p": 1})(PICTURE, np.random.default_rng(1))
    assert list(record) == [name]
    assert json.loads(json.dumps(record)) == record
    assert picture.shape == PICTURE.shape and picture.dtype == np.uint8 and picture.flags.writeable
    assert 0 < np.abs(picture.astype(int) - PICTURE).mean() < 40
    np.testing.assert_array_equal(PICTURE, before)


def test_one_setting_does_not_change_what_another_one_does():
    alone = Distortions(**OFF | {"jpeg_p": 1})(PICTURE, np.random.default_rng(3))[1]
    together = Distortions(**OFF | {"jpeg_p": 1, "colour_p": 1, "noise_p": 1})(PICTURE, np.random.default_rng(3))[1]
    assert alone["jpeg"] == together["jpeg"]


def test_jpeg_has_the_quality_and_the_subsampling_that_it_is_told():
    image = Image.fromarray(PICTURE)

    def error(quality: int, subsampling: str) -> float:
        return float(np.abs(np.asarray(compressed(image, quality, subsampling)).astype(int) - PICTURE).mean())

    assert error(95, "4:4:4") < error(50, "4:4:4")
    assert error(95, "4:4:4") < error(95, "4:2:0")


def test_draws_stay_in_their_ranges_and_both_subsamplings_come():
    distortions = Distortions(**OFF | {"jpeg_p": 1, "rescale_p": 1, "jpeg_quality": [60, 62], "rescale": [0.7, 0.8]})
    records = [distortions(PICTURE, np.random.default_rng(seed))[1] for seed in range(40)]
    assert {record["jpeg"]["quality"] for record in records} == {60, 61, 62}
    assert {record["jpeg"]["subsampling"] for record in records} == {"4:4:4", "4:2:0"}
    assert all(0.7 <= record["rescale"] <= 0.8 for record in records)


def test_a_rescaled_picture_loses_detail_but_stays_in_place():
    square = np.zeros((64, 64, 3), np.uint8)
    square[20:40, 10:50] = 255
    picture, _ = Distortions(**OFF | {"rescale_p": 1})(square, np.random.default_rng(0))
    np.testing.assert_array_equal(picture[..., 0] > 127, square[..., 0] > 127)


def test_noise_has_its_standard_deviation():
    grey = np.full((100, 100, 3), 128, np.uint8)
    picture, record = Distortions(**OFF | {"noise_p": 1, "noise": [5, 5]})(grey, np.random.default_rng(0))
    assert record["noise"] == 5
    assert np.std(picture.astype(float)) == pytest.approx(5, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jpeg_p": 2}, "jpeg_p must be a number from 0 to 1, got 2"),
        ({"jpeg_quality": [0, 90]}, r"jpeg_quality must be \[low, high\], from 1 to 100, got \[0, 90\]"),
        ({"rescale": [0.9, 0.5]}, r"rescale must be \[low, high\], from 0.05 to 1, got \[0.9, 0.5\]"),
        ({"noise": 3}, "noise must be .*, got 3"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Distortions(**settings)
