"""Segmentation metrics: against loops, the rule for empty masks, unknown pixels, and how batches may be cut."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from metrics.calibration import calibrated_threshold, probability_histogram
from metrics.segmentation import SegmentationMetrics, auroc, boundary_f

THRESHOLD = 0.45
KEYS = {
    "iou",
    "dice",
    "precision",
    "recall",
    "specificity",
    "accuracy",
    "iou_per_image",
    "dice_per_image",
    "iou_marked",
    "false_alarm_rate",
    "num_marked",
    "num_clean",
    "auroc",
    "threshold",
}


def make_images(seed: int, *, num: int = 6, size: int = 24) -> tuple[Tensor, Tensor]:
    """Probabilities and targets. The first two images are clean, one of them without a false alarm."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(num, 1, size, size, dtype=torch.uint8)
    for image in range(2, num):
        top, left = torch.randint(size // 2, (2,), generator=generator).tolist()
        target[image, 0, top : top + 5 + image, left : left + 9] = 1
    noise = 0.3 * torch.randn(target.shape, generator=generator)
    probability = torch.sigmoid(4 * (target + noise) - 2.5)
    probability[0] = 0.2
    target[:, :, -2:] = 255
    return probability, target


def metric(probability: Tensor, target: Tensor, *, batch: int = 2, **options: Any) -> SegmentationMetrics:
    found = SegmentationMetrics(**{"threshold": THRESHOLD} | options)
    for p, t in zip(probability.split(batch), target.split(batch), strict=True):
        found.update(probability=p, target=t)
    return found


def numbers(found: SegmentationMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in found.compute().items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_a_loop(probability: Tensor, target: Tensor, threshold: float = THRESHOLD) -> dict[str, float]:
    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else 1.0

    counts, marked, largest = [], [], []
    for p, t in zip(probability, target, strict=True):
        known = t != 255
        p, t = p[known], t[known]
        predicted = p >= threshold
        tp, fp = int((predicted & (t == 1)).sum()), int((predicted & (t == 0)).sum())
        counts.append((tp, fp, int(t.sum()) - tp, int((t == 0).sum()) - fp))
        marked.append(bool(t.any()))
        largest.append(p.max().item())
    tp, fp, fn, tn = (sum(column) for column in zip(*counts, strict=True))
    iou = [ratio(tp, tp + fp + fn) for tp, fp, fn, _ in counts]
    clean = [count for count, is_marked in zip(counts, marked, strict=True) if not is_marked]
    pairs = [
        (largest[i] > largest[j]) + 0.5 * (largest[i] == largest[j])
        for i in range(len(counts))
        for j in range(len(counts))
        if marked[i] and not marked[j]
    ]
    return {
        "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "iou_per_image": mean(iou),
        "dice_per_image": mean([ratio(2 * tp, 2 * tp + fp + fn) for tp, fp, fn, _ in counts]),
        "iou_marked": mean([value for value, is_marked in zip(iou, marked, strict=True) if is_marked]),
        "false_alarm_rate": mean([fp >= 0.001 * (fp + tn) for _, fp, _, tn in clean]),
        "num_marked": sum(marked),
        "num_clean": len(clean),
        "auroc": mean(pairs),
        "threshold": threshold,
    }


def test_against_a_loop() -> None:
    probability, target = make_images(0)
    expected = by_a_loop(probability, target)
    assert set(expected) == KEYS
    assert 0.3 < expected["iou"] < 0.95 and expected["iou"] != expected["iou_per_image"]
    assert expected["false_alarm_rate"] == 0.5
    assert numbers(metric(probability, target)) == pytest.approx(expected, rel=1e-6)


def test_without_a_threshold_it_is_the_one_with_the_best_f1() -> None:
    probability, target = make_images(0)
    best = calibrated_threshold(probability_histogram(probability, target))
    assert best != THRESHOLD
    expected = by_a_loop(probability, target, best)
    assert numbers(metric(probability, target, threshold=None)) == pytest.approx(expected, rel=1e-6)
    assert expected["dice"] > by_a_loop(probability, target)["dice"]


def test_thresholds_that_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="threshold must be one of"):
        SegmentationMetrics(threshold=0.455)
    with pytest.raises(ValueError, match="boundary needs a threshold"):
        SegmentationMetrics(boundary=True)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_batches_do_not_matter(batch: int) -> None:
    """A mean of batches' scores would: the last batch of 4 and 2 counts as much as the first."""
    probability, target = make_images(1)
    expected = numbers(metric(probability, target, batch=2, boundary=True))
    assert numbers(metric(probability, target, batch=batch, boundary=True)) == pytest.approx(expected, rel=1e-12)


def test_ranks_add_up() -> None:
    """What DDP does: every state is summed over the ranks, or joined."""
    probability, target = make_images(2)
    first = metric(probability[:4], target[:4], boundary=True)
    first.merge_state(metric(probability[4:], target[4:], boundary=True))
    together = metric(probability, target, boundary=True)
    assert numbers(first) == pytest.approx(numbers(together), rel=1e-12)
    assert torch.equal(first.histogram(), together.histogram())


def test_unknown_pixels_do_not_count() -> None:
    probability, target = make_images(3)
    expected = numbers(metric(probability, target, boundary=True))
    padded = pad(probability, (3, 4, 5, 2), value=0.999), pad(target, (3, 4, 5, 2), value=255)
    assert numbers(metric(*padded, boundary=True)) == expected
    # Nor does an image of which nothing is known.
    more = torch.cat([padded[0], padded[0][:1]]), torch.cat([padded[1], torch.full_like(padded[1][:1], 255)])
    assert numbers(metric(*more, boundary=True)) == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_finite_whatever_is_missing() -> None:
    probability, target = make_images(4)
    nothing_wrong = {"iou": 1, "iou_marked": 1, "false_alarm_rate": 0, "auroc": 0.5, "boundary_f": 1}
    empty = SegmentationMetrics(threshold=THRESHOLD, boundary=True)
    values = numbers(empty)
    assert {name: values[name] for name in nothing_wrong} == nothing_wrong
    assert all(math.isfinite(value) for value in values.values())
    clean = numbers(metric(probability[:1], target[:1], boundary=True))
    assert {name: clean[name] for name in nothing_wrong} == nothing_wrong
    assert (clean["num_clean"], clean["num_marked"]) == (1, 0)
    marked = numbers(metric(probability[2:], target[2:], boundary=True))
    assert (marked["false_alarm_rate"], marked["auroc"], marked["iou_marked"]) == (0, 0.5, marked["iou_per_image"])
    assert all(math.isfinite(value) for value in (*clean.values(), *marked.values()))


def test_a_thousandth_of_a_clean_image_is_a_false_alarm() -> None:
    for num_found, expected in ((1, 0), (2, 1)):
        probability = torch.zeros(1, 1, 40, 51)
        probability.flatten()[:num_found] = 0.9
        target = torch.zeros(probability.shape, dtype=torch.uint8)
        target[..., -1] = 255  # 40 x 50 = 2000 are known
        assert numbers(metric(probability, target))["false_alarm_rate"] == expected


def test_the_threshold_itself_is_predicted() -> None:
    probability, target = torch.full((1, 1, 4, 4), THRESHOLD), torch.ones(1, 1, 4, 4)
    assert numbers(metric(probability, target))["iou"] == 1
    assert numbers(metric(probability - 1e-6, target))["iou"] == 0


def test_rows_are_those_of_the_last_batch() -> None:
    probability, target = make_images(6)
    found = metric(probability, target, batch=4, boundary=True)
    rows = found.rows()
    assert len(rows) == 2
    for row, image in zip(rows, (4, 5), strict=True):
        predicted, known = probability[image] >= THRESHOLD, target[image]
        counts = [(predicted == p) & (known == t) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0))]
        assert [row[name] for name in ("tp", "fp", "fn", "tn")] == [int(count.sum()) for count in counts]
        assert row["iou"] == row["tp"] / (row["tp"] + row["fp"] + row["fn"])
        known = target[image] != 255
        assert row["max_probability"] == probability[image][known].max()
        assert row["boundary_f"] == boundary_f(probability[image] >= THRESHOLD, target[image]).item()
    assert list(rows[0]) == [
        *("tp", "fp", "fn", "tn", "iou", "dice", "precision", "recall", "boundary_f", "max_probability"),
    ]
    assert "boundary_f" not in metric(probability, target).rows()[0]
    assert "boundary_f" not in metric(probability, target).compute()


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device: to read a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "index"}:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_an_update_never_waits_for_the_device() -> None:
    probability, target = make_images(7)
    found = SegmentationMetrics(threshold=THRESHOLD, boundary=True)
    with NoReading():
        found.update(probability=probability, target=target)
        with pytest.raises(AssertionError, match="waits"):
            found.largest[0].sum().item()


def test_shapes_that_do_not_fit() -> None:
    found = SegmentationMetrics()
    for p, t in (((2, 1, 4, 4), (2, 4, 4)), ((2, 4, 4), (2, 4, 4)), ((2, 2, 4, 4), (2, 2, 4, 4))):
        with pytest.raises(ValueError, match="probability and target must both have shape"):
            found.update(probability=torch.zeros(p), target=torch.zeros(t))


# Boundaries


def square(top: int, left: int, *, size: int = 8, height: int = 24, width: int = 24) -> Tensor:
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, top : top + size, left : left + size] = True
    return mask


def test_boundaries_match_within_two_pixels() -> None:
    mask = square(8, 8)
    for shift, expected in ((0, 1.0), (1, 1.0), (2, 1.0)):
        for down, right in ((shift, 0), (0, -shift), (shift, shift)):
            assert boundary_f(square(8 + down, 8 + right), mask).item() == expected
    # Three to the right: the upper and lower edges still match but for their ends, the left and right ones do not.
    three = boundary_f(square(8, 11), mask).item()
    assert 0.3 < three < 0.8
    assert boundary_f(square(8, 11), mask, pixels=3).item() == 1
    assert boundary_f(square(8, 10), mask, pixels=1).item() < 1


def test_boundary_f_by_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(1, 12, 14, generator=generator) < 0.15 for _ in range(2))

    def edge(mask: Tensor) -> list[tuple[int, int]]:
        """None of these fills a neighbourhood, so all pixels are at the edge of their mask."""
        return [(int(y), int(x)) for y, x in mask[0].nonzero()]

    def share(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return mean([any(max(abs(y - v), abs(x - u)) <= 2 for v, u in others) for y, x in points])

    precision, recall = share(edge(first), edge(second)), share(edge(second), edge(first))
    expected = 2 * precision * recall / (precision + recall)
    assert expected < 1
    assert boundary_f(first, second).item() == pytest.approx(expected)


def test_boundary_of_nothing_and_of_everything() -> None:
    nothing, everything, mask = square(0, 0, size=0), square(0, 0, size=24), square(8, 8)
    assert boundary_f(nothing, nothing).item() == 1
    assert boundary_f(everything, everything).item() == 1
    assert boundary_f(nothing, mask).item() == boundary_f(mask, nothing).item() == 0
    assert boundary_f(mask, square(0, 0, size=2)).item() == 0


def test_where_the_image_ends_there_is_no_boundary() -> None:
    left = torch.zeros(1, 24, 24, dtype=torch.bool)
    left[..., :10] = True
    unknown = torch.where(torch.arange(30) < 24, pad(left, (0, 6)).to(torch.uint8), 255)
    shifted = pad(left.roll(4, -1), (0, 6), value=True)
    shifted[..., :14] = True
    # Only the edge in the middle counts, and it is 4 pixels away.
    assert boundary_f(shifted, unknown).item() == 0
    assert boundary_f(pad(left, (0, 6), value=True), unknown).item() == 1


# Image level


def test_auroc() -> None:
    generator = torch.Generator().manual_seed(0)
    score = (torch.rand(40, generator=generator) * 10).round() / 10
    marked = torch.rand(40, generator=generator) < score
    pairs = [(a > b) + 0.5 * (a == b) for a in score[marked] for b in score[~marked]]
    assert auroc(score, marked).item() == pytest.approx(mean([float(pair) for pair in pairs]))
    assert auroc(marked.float(), marked).item() == 1
    assert auroc(-marked.float(), marked).item() == 0
    assert auroc(torch.ones(40), marked).item() == 0.5
