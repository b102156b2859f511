"""Crops: the same from the same generator, of the size asked for, and image and mask never apart."""

import numpy as np
import pytest

from data.photo_crops import crop_pair, crop_photo, draw_scale


def ramp(height: int, width: int) -> np.ndarray:
    """Red counts rows and green columns, so that a crop tells where it is from."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.dstack([y, x, np.zeros_like(y)])


@pytest.mark.parametrize("shape", [(200, 240), (40, 250), (10, 7), (64, 64), (1, 1)])
def test_a_photo_of_any_size_gives_the_size_asked_for(shape):
    for seed in range(5):
        crop = crop_photo(ramp(*shape), np.random.default_rng(seed), 64)
        assert crop.shape == (64, 64, 3) and crop.dtype == np.uint8 and crop.flags.writeable


def test_scale_is_the_zoom():
    for scale in (0.5, 1.0, 2.0):
        crop = crop_photo(ramp(250, 250), np.random.default_rng(0), 100, scale=(scale, scale), flip=False).astype(float)
        slope = (crop[-10, 50, 0] - crop[10, 50, 0]) / 80
        assert slope == pytest.approx(1 / scale, rel=0.03)


def test_a_smaller_copy_has_no_aliasing():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than a half-size crop can show
    crop = crop_photo(stripes, np.random.default_rng(0), 128, scale=(0.5, 0.5))
    assert np.abs(crop.astype(int) - 127).max() < 40


def test_scales_are_drawn_in_octaves():
    rng = np.random.default_rng(0)
    scales = np.array([draw_scale(rng, (0.5, 2.0)) for _ in range(2000)])
    assert scales.min() >= 0.5 and scales.max() <= 2.0
    assert np.mean(scales < 1) == pytest.approx(0.5, abs=0.04)


def test_flips_come_in_one_half_of_the_crops_or_never():
    def flipped(flip: bool) -> float:
        crops = [crop_photo(ramp(90, 90), np.random.default_rng(seed), 32, flip=flip) for seed in range(100)]
        return float(np.mean([crop[16, 2, 1] > crop[16, -3, 1] for crop in crops]))

    assert 0.3 < flipped(True) < 0.7
    assert flipped(False) == 0.0


def test_the_generator_decides():
    crops = [crop_photo(ramp(200, 200), np.random.default_rng(seed), 48) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


def test_a_pair_at_native_scale_is_cut_out_of_both_at_one_place():
    image = ramp(100, 120)
    mask = ((image[..., 0] + image[..., 1]) % 3 == 0).astype(np.uint8)
    mask[:5] = 255
    for seed in range(10):
        crop, part = crop_pair(image, mask, np.random.default_rng(seed), 40)
        np.testing.assert_array_equal(part, mask[crop[..., 0], crop[..., 1]])


def test_a_scaled_pair_stays_together_and_its_mask_keeps_its_values():
    image = ramp(200, 200)
    mask = np.where(image[..., 1] >= 100, 1, 0).astype(np.uint8)
    mask[:20] = 255
    for seed in range(10):
        crop, part = crop_pair(image, mask, np.random.default_rng(seed), 64, scale=(0.5, 2.0))
        assert set(np.unique(part)) <= {0, 1, 255}
        column = crop[..., 1].astype(int)
        sure = (part != 255) & (np.abs(column - 100) > 2)  # at the edge itself the image is smooth, the mask is not
        np.testing.assert_array_equal(part[sure], column[sure] > 100)


def test_a_small_pair_is_continued_as_in_a_mirror():
    image = ramp(10, 30)
    mask = (image[..., 0] == 9).astype(np.uint8)
    crop, part = crop_pair(image, mask, np.random.default_rng(0), 20, flip=False)
    assert crop[:, 0, 0].tolist() == [*range(10), *reversed(range(10))]
    np.testing.assert_array_equal(part, crop[..., 0] == 9)
