"""Scores from counts, histograms of probabilities, and the thresholds that are chosen on them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metrics.calibration import (
    NUM_BINS,
    THRESHOLDS,
    calibrated_threshold,
    counts_at,
    f_beta,
    probability_histogram,
    recall_at,
    scores,
    threshold_for_recall,
)


def histogram(*pixels: tuple[float, int, int]) -> Tensor:
    """Of (probability, target, how many)."""
    p = torch.tensor([p for p, _, _ in pixels])
    target = torch.tensor([t for _, t, _ in pixels], dtype=torch.uint8)
    times = torch.tensor([n for _, _, n in pixels], dtype=torch.int64)
    return probability_histogram(p.repeat_interleave(times), target.repeat_interleave(times))


# Scores

EMPTY_RULE = [
    ("found empty", (0, 0, 0, 9), {"iou": 1, "dice": 1, "precision": 1, "recall": 1, "specificity": 1, "accuracy": 1}),
    ("false alarm", (0, 3, 0, 6), {"iou": 0, "dice": 0, "precision": 0, "recall": 1}),
    ("missed", (0, 0, 3, 6), {"iou": 0, "dice": 0, "precision": 1, "recall": 0}),
    ("half", (2, 1, 1, 5), {"iou": 0.5, "dice": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "specificity": 5 / 6}),
]


@pytest.mark.parametrize(
    ("counts", "expected"), [case[1:] for case in EMPTY_RULE], ids=[case[0] for case in EMPTY_RULE]
)
def test_scores_and_the_rule_for_empty_masks(counts: tuple[int, ...], expected: dict[str, float]) -> None:
    found = scores(*torch.tensor(counts))
    assert {name: found[name].item() for name in expected} == pytest.approx(expected)


def test_another_rule_for_empty_masks_and_many_at_once() -> None:
    tp, fp, fn, tn = torch.tensor([(0, 0, 0, 9), (2, 1, 1, 5)]).T
    assert scores(tp, fp, fn, tn, empty=0.0)["iou"].tolist() == [0, 0.5]
    assert scores(tp, fp, fn, tn, empty=math.nan)["recall"].isnan().tolist() == [True, False]


def test_f_beta_weighs_recall() -> None:
    tp, fp, fn = torch.tensor(6), torch.tensor(2), torch.tensor(6)
    precision, recall = 6 / 8, 6 / 12
    for beta in (0.5, 1.0, 2.0):
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert f_beta(tp, fp, fn, beta=beta).item() == pytest.approx(expected)


# Histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_those_of_comparing_with_each_threshold(dtype: torch.dtype) -> None:
    """Also where the probability is the threshold, 0.29 and others that no binary number equals."""
    generator = torch.Generator().manual_seed(0)
    p = (torch.randint(101, (2, 1, 30, 40), generator=generator) / 100.0).to(dtype)
    p[0] = torch.rand(p[0].shape, generator=generator)
    p[:, :, 0] = torch.tensor(0.29, dtype=dtype)
    target = torch.randint(2, p.shape, generator=generator)
    target[:, :, 1:3] = 255
    counts = counts_at(probability_histogram(p, target))
    marked, clean = target == 1, target == 0
    for threshold, found in zip(THRESHOLDS, counts.tolist(), strict=True):
        predicted = p >= threshold
        parts = (predicted & marked, predicted & clean, ~predicted & marked, ~predicted & clean)
        assert found == [int(part.sum()) for part in parts]


def test_half_precision_and_the_ends() -> None:
    found = probability_histogram(torch.tensor([0.0, 0.005, 1.0], dtype=torch.bfloat16), torch.tensor([0, 1, 1]))
    assert found.shape == (2, NUM_BINS) and found.dtype == torch.int64
    assert (found[0, 0], found[1, 0], found[1, -1], found.sum()) == (1, 1, 1, 3)


def test_another_shape_is_no_histogram() -> None:
    with pytest.raises(ValueError, match=r"histogram must have shape \(2, 100\), got \(2, 99\)"):
        counts_at(torch.zeros(2, 99, dtype=torch.int64))


# Thresholds


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([], 0.5),
        ([(0.3, 1, 5), (0.28, 0, 5)], 0.3),
        ([(0.8, 1, 5), (0.2, 0, 5)], 0.5),  # .25 to .8 are all perfect
        ([(0.95, 1, 5), (0.72, 0, 5)], 0.75),  # .75 to .95: the nearest to 0.5
        ([(0.34, 1, 5), (0.12, 0, 5)], 0.3),  # .15 to .3
        ([(0.9, 0, 5)], 0.95),  # nothing marked: where nothing is found either
        ([(0.97, 0, 5)], 0.5),  # nothing marked, and always something found
    ],
)
def test_calibrated_threshold(pixels: list[Any], expected: float) -> None:
    assert calibrated_threshold(histogram(*pixels)) == expected


def test_a_tie_on_both_sides_of_a_half_goes_to_the_lower() -> None:
    # At .45 2 of 2 found and 2 false alarms, at .5 1 of 2 and 1, at .55 1 of 2 and 0: F1 2/3, 1/2, 2/3.
    found = histogram((0.47, 1, 1), (0.47, 0, 1), (0.52, 0, 1), (0.6, 1, 1))
    assert calibrated_threshold(found) == 0.45


def test_threshold_for_recall() -> None:
    found = histogram((0.9, 1, 5), (0.4, 1, 4), (0.005, 1, 1), (0.7, 0, 100))
    assert threshold_for_recall(found, 0.1) == 0.9
    assert threshold_for_recall(found, 0.5) == 0.9
    assert threshold_for_recall(found, 0.51) == 0.4
    assert threshold_for_recall(found, 0.9) == 0.4
    assert threshold_for_recall(found, 0.95) == THRESHOLDS[0]  # nothing finds the last one
    for wanted in (0.1, 0.3, 0.7):  # a share that is hit exactly is enough
        ten = histogram((0.6, 1, round(10 * wanted)), (0.2, 1, 10 - round(10 * wanted)))
        assert threshold_for_recall(ten, wanted) == 0.6


def test_recall_of_a_threshold() -> None:
    histogram = torch.zeros(2, 100, dtype=torch.int64)
    assert recall_at(histogram, 0.5) == 1.0
    histogram[1, 20], histogram[1, 70] = 10, 90
    assert [recall_at(histogram, level) for level in (0.0, 0.2, 0.21, 0.7, 0.705, 0.71, 1.0)] == [
        1,
        1,
        0.9,
        0.9,
        0.9,
        0,
        0,
    ]


@pytest.mark.parametrize("recall", [0.0, -1.0, 1.1, math.nan])
def test_no_such_recall(recall: float) -> None:
    with pytest.raises(ValueError, match="recall must be above 0 and at most 1"):
        threshold_for_recall(histogram((0.9, 1, 5)), recall)


def test_no_recall_without_marks() -> None:
    with pytest.raises(ValueError, match="recall: .* no marked pixel was counted"):
        threshold_for_recall(histogram((0.9, 0, 5)), 0.9)
