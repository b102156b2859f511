"""Components of masks against what was drawn, against scipy's own disk and against the plain run-length encoding."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from modules.regions import decode, dilate, regions, remove_doubtful


def draw(*size: int, boxes: list[tuple[int, int, int, int]]) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


def random_mask(height: int, width: int, share: float) -> torch.Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(height + width)) < share


def plain_counts(mask: torch.Tensor) -> list[int]:
    """COCO's definition, pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def test_all_components_are_listed_not_only_the_largest():
    boxes = [(5, 2, 10, 3), (50, 2, 2, 2), (0, 20, 30, 10), (40, 30, 1, 1)]
    mask = draw(40, 60, boxes=boxes)
    probability = torch.zeros(40, 60)
    for index, (x, y, width, height) in enumerate(boxes):
        probability[y : y + height, x : x + width] = 0.6 + 0.1 * index
    found = regions(mask, probability)
    assert [region["bbox"] for region in found] == [list(box) for box in boxes]
    assert [region["area"] for region in found] == [30, 4, 300, 1]
    assert [region["mean_probability"] for region in found] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert json.loads(json.dumps(found)) == found  # plain numbers


def test_order_is_top_to_bottom_then_left_to_right():
    mask = draw(30, 30, boxes=[(20, 5, 3, 20), (10, 5, 3, 3), (2, 6, 2, 2), (25, 0, 2, 2)])
    places = [region["bbox"][:2] for region in regions(mask, mask.float())]
    assert places == [[25, 0], [10, 5], [20, 5], [2, 6]]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 1), (1, 9), (23, 31)])
def test_the_encodings_add_up_to_the_mask(size, share):
    mask = random_mask(*size, share)
    found = regions(mask, mask.float())
    union = torch.zeros(size, dtype=torch.int64)
    for region in found:
        component = decode(region["rle"])
        rows, columns = component.nonzero(as_tuple=True)
        x, y, width, height = region["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert region["area"] == component.sum()
        assert region["rle"]["counts"] == plain_counts(component)
        union += component
    assert torch.equal(union, mask.long())  # each pixel once


def test_the_mean_is_that_of_the_pixels_not_of_the_box():
    mask = torch.eye(5) > 0
    probability = torch.where(mask, 0.75, 0.25)
    (region,) = regions(mask, probability)
    assert region["mean_probability"] == 0.75
    assert region["area"] == 5  # corners connect


def test_an_empty_mask_has_no_regions():
    empty = torch.zeros(8, 9, dtype=torch.bool)
    assert regions(empty, empty.float()) == []
    assert torch.equal(remove_doubtful(empty, empty.float(), min_area=5, least=0.5), empty)
    assert torch.equal(dilate(empty, 5), empty)


@pytest.mark.parametrize("min_area", [0, 1, 2, 4, 5, 1000])
def test_small_components_are_removed_and_the_others_untouched(min_area):
    mask = random_mask(60, 50, 0.2)
    kept = remove_doubtful(mask, mask.float(), min_area=min_area, least=0.5)
    assert kept.dtype == torch.bool
    expected = [region for region in regions(mask, mask.float()) if region["area"] >= min_area]
    assert regions(kept, mask.float()) == expected
    assert not (kept & ~mask).any()


@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("size", [(40, 60), (3, 50), (50, 3), (1, 1)])
def test_dilation_is_that_of_a_disk(size, pixels):
    mask = random_mask(*size, 0.02)
    mask[0, 0] = mask[-1, -1] = True
    y, x = np.ogrid[-pixels : pixels + 1, -pixels : pixels + 1]
    expected = binary_dilation(mask.numpy(), x**2 + y**2 <= pixels**2)
    before = mask.clone()
    grown = dilate(mask, pixels)
    assert torch.equal(grown, torch.from_numpy(expected))
    assert torch.equal(mask, before)
    if not pixels:
        assert torch.equal(grown, mask)


def test_dilation_needs_whole_pixels():
    with pytest.raises(ValueError, match="pixels must be a whole number"):
        dilate(torch.ones(3, 3, dtype=torch.bool), -1)


@pytest.mark.parametrize("mask", [torch.ones(3, 3), torch.ones(1, 3, 3, dtype=torch.bool)])
def test_a_mask_of_another_kind(mask):
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        regions(mask, torch.ones(3, 3))


def test_components_stay_whole_where_they_are_certain_somewhere():
    mask = draw(12, 20, boxes=[(1, 1, 5, 2), (6, 3, 2, 2), (12, 6, 4, 4)])  # the first two touch at a corner
    probability = 0.5 * mask.float()
    probability[4, 7] = 0.9
    probability[0, 0] = 1.0  # outside

    def kept(least: float, min_area: int = 1) -> torch.Tensor:
        return remove_doubtful(mask, probability, min_area=min_area, least=least)

    assert torch.equal(kept(0.9), draw(12, 20, boxes=[(1, 1, 5, 2), (6, 3, 2, 2)]))
    assert torch.equal(kept(0.5), mask)
    assert torch.equal(kept(0.5, min_area=15), draw(12, 20, boxes=[(12, 6, 4, 4)]))
    assert not kept(0.95).any() and not kept(0.9, min_area=15).any()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert not remove_doubtful(nothing, torch.ones(3, 4), min_area=1, least=0.5).any()
