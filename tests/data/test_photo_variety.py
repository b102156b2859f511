"""What other photos are made of a photo, and that a data set does so in training alone, apart from the marks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.photo_variety import PhotoVariety
from data.watermark import WatermarkData


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def refuse() -> np.ndarray:
    raise AssertionError("no other photo is wanted")


def test_without_shares_a_photo_stays_as_it_is() -> None:
    assert np.array_equal(PhotoVariety()(photo(), np.random.default_rng(0), refuse), photo())


def test_turning_moves_pixels_and_changes_none() -> None:
    turned = {PhotoVariety(turn_p=1)(photo(), np.random.default_rng(seed), refuse).tobytes() for seed in range(40)}
    known = {np.rot90(photo(), quarters).tobytes() for quarters in (1, 2, 3)} | {photo()[::-1].tobytes()}
    assert turned == known


def test_recolouring_keeps_the_order_of_levels_in_each_channel_or_turns_it_round() -> None:
    negatives = 0
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)  # (256, 1, 3)
    for seed in range(60):
        levels = PhotoVariety(recolour_p=1, gamma=(0.5, 2))(ramp, np.random.default_rng(seed), refuse)[:, 0].astype(int)
        falling = levels[0, 0] > levels[-1, 0]
        rising = levels[::-1] if falling else levels
        assert (np.diff(rising, axis=0) >= 0).all() and (rising[0] == 0).all() and (rising[-1] == 255).all()
        assert rising[128].min() >= 62 and rising[128].max() <= 182  # 255 / 4 and 255 * 0.5 ** 0.5
        negatives += int(falling)
    assert 10 <= negatives <= 30


def test_channels_are_exchanged() -> None:
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[..., 0] = 255
    made = [PhotoVariety(recolour_p=1)(red, np.random.default_rng(seed), refuse)[0, 0] for seed in range(30)]
    assert {int(pixel.argmax()) for pixel in made if pixel.sum() == 255} == {0, 1, 2}


def test_another_photo_is_laid_over_by_its_weight() -> None:
    blended = PhotoVariety(overlay_p=1, overlay=(0.25, 0.25))(photo(), np.random.default_rng(0), lambda: photo(1))
    assert blended.dtype == np.uint8
    assert np.abs(blended - (0.75 * photo() + 0.25 * photo(1))).max() <= 0.501


def test_the_parts_do_not_disturb_one_another() -> None:
    for seed in range(10):
        laid, both = (
            PhotoVariety(overlay_p=0.5, turn_p=share)(photo(), np.random.default_rng(seed), lambda: photo(1))
            for share in (0, 1)
        )
        assert sorted(laid.reshape(-1, 3).tolist()) == sorted(both.reshape(-1, 3).tolist())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"turn_p": 1.5}, "variety[.]turn_p must be"),
        ({"overlay": [0.5, 0.2]}, "variety[.]overlay must be"),
        ({"gamma": 0.5}, "variety[.]gamma must be"),
        ({"blur_p": 0.5}, "variety[.]got an unexpected keyword argument 'blur_p'"),
    ],
)
def test_values_that_cannot_be_used(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WatermarkData(train_manifest="x.jsonl", variety=values)


def test_training_photos_are_made_other_ones_and_the_marks_stay(photos: Path) -> None:
    def items(**variety: float) -> list[dict[str, Any]]:
        manifests = {f"{part}_manifest": str(photos / f"{part}.jsonl") for part in ("train", "val")}
        data = WatermarkData(**manifests, crop=48, train_examples=12, val_examples=2, variety=variety)
        data.setup("fit")
        sets: Any = data._datasets
        return [sets["train"].dataset[index, 0] for index in range(12)] + [sets["val"].dataset[i, 0] for i in (0, 1)]

    plain, varied, again = items(), items(overlay_p=1.0), items(overlay_p=1.0)
    same = [bool((one["image"] == other["image"]).all()) for one, other in zip(plain, varied, strict=True)]
    assert not any(same[:12]) and all(same[12:])
    assert all(bool((one["image"] == other["image"]).all()) for one, other in zip(varied, again, strict=True))
    # A mark is drawn again where it cannot be seen, so a few masks may be others.
    kept = [bool((one["mask"] == other["mask"]).all()) for one, other in zip(plain, varied, strict=True)]
    assert sum(kept[:12]) >= 8
