"""From counts of pixels to scores, and from the scores at each threshold to the threshold.

Pixels of a whole data set are kept as a histogram (2, 100) of int64: row 0 for unmarked and row 1 for marked pixels,
bin k for probabilities that reach k of the THRESHOLDS 0.01, 0.02 … 0.99. A pixel is predicted where its probability
reaches the threshold (>=), so the counts at all thresholds follow from the histogram exactly.

A ratio 0 / 0 is 1 by default: an empty mask found empty is perfect (all scores 1), a false alarm on an empty mask has
precision, IoU and Dice 0 (and recall 1, there was nothing to miss), a missed mask recall, IoU and Dice 0 (and precision
1, nothing was claimed).
"""

import torch
from torch import Tensor

UNKNOWN = 255
THRESHOLDS = tuple(k / 100 for k in range(1, 100))
NUM_BINS = len(THRESHOLDS) + 1
_GRID = range(5, 100, 5)  # in hundredths


def f_beta(tp: Tensor, fp: Tensor, fn: Tensor, *, beta: float = 1.0, empty: float = 1.0) -> Tensor:
    """(1 + beta^2) TP / ((1 + beta^2) TP + beta^2 FN + FP), in float64; *empty* for 0 / 0. With beta 1: Dice.

    Shape: all one, also that of the result.
    """
    hits = (1 + beta**2) * tp.double()
    return _ratio(hits, hits + beta**2 * fn.double() + fp.double(), empty)


def scores(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor, *, empty: float = 1.0) -> dict[str, Tensor]:
    """`iou`, `dice`, `precision`, `recall`, `specificity` and `accuracy`, in float64; *empty* (also NaN) for 0 / 0.

    Shape: all one, also that of the results.
    """
    return {
        "iou": _ratio(tp, tp + fp + fn, empty),
        "dice": f_beta(tp, fp, fn, empty=empty),
        "precision": _ratio(tp, tp + fp, empty),
        "recall": _ratio(tp, tp + fn, empty),
        "specificity": _ratio(tn, tn + fp, empty),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn, empty),
    }


@torch.no_grad()
def probability_histogram(probability: Tensor, target: Tensor) -> Tensor:
    """How many pixels of each target class, 0 and 1, have which probability; those whose target is 255 are left out.

    Shape: any, the same -> (2, 100) int64.
    """
    probability = probability.to(torch.promote_types(probability.dtype, torch.float32)).flatten()
    # In the probability's own dtype: 0.29 has to reach 0.29 in both.
    edges = torch.tensor(THRESHOLDS, dtype=probability.dtype).to(probability.device, non_blocking=True)
    cell = torch.bucketize(probability, edges, right=True)
    target = target.flatten()
    # Not bincount, for which the host waits for the device. The cell at the end is for the unknown.
    cell = torch.where(target == UNKNOWN, 2 * NUM_BINS, cell + NUM_BINS * (target == 1))
    counts = torch.zeros(2 * NUM_BINS + 1, dtype=torch.int64, device=cell.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell[:1]).expand_as(cell))
    return counts[:-1].view(2, NUM_BINS)


def counts_at(histogram: Tensor) -> Tensor:
    """TP, FP, FN and TN at each of the THRESHOLDS. Shape: (2, 100) -> (99, 4) int64."""
    if tuple(histogram.shape) != (2, NUM_BINS):
        raise ValueError(f"histogram must have shape (2, {NUM_BINS}), got {tuple(histogram.shape)}")
    below = histogram.cumsum(1)[:, :-1]  # (2, 99): pixels that do not reach the threshold
    reached = histogram.sum(1, keepdim=True) - below
    return torch.stack([reached[1], reached[0], below[1], below[0]], dim=1)


def calibrated_threshold(histogram: Tensor) -> float:
    """The threshold of .05, .10 … .95 with the largest F1 over all pixels; of several that nearest to 0.5, or lower.

    An empty histogram gives 0.5. Shape: (2, 100).
    """
    tp, fp, fn, _ = counts_at(histogram).T
    f1 = f_beta(tp, fp, fn).tolist()
    best = max(_GRID, key=lambda percent: (f1[percent - 1], -abs(percent - 50)))
    return THRESHOLDS[best - 1]


def recall_at(histogram: Tensor, threshold: float) -> float:
    """The share of the marked pixels that a threshold finds, by the next of the THRESHOLDS below it.

    1 where no marked pixels were counted. Shape: (2, 100).
    """
    tp, _, fn, _ = counts_at(histogram).T
    index = max(sum(known <= threshold for known in THRESHOLDS) - 1, 0)
    return float(_ratio(tp, tp + fn, 1.0)[index])


def threshold_for_recall(histogram: Tensor, recall: float) -> float:
    """The highest of the THRESHOLDS that finds at least the share *recall* of the marked pixels; the lowest if none.

    Raises ValueError where no marked pixels were counted, of which a share could be found. Shape: (2, 100).
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1, got {recall!r}")
    tp, _, fn, _ = counts_at(histogram).T
    if not int(tp[0] + fn[0]):
        raise ValueError(
            f"recall: no threshold is known to find {recall:g} of the marks, as no marked pixel was counted"
        )
    found = _ratio(tp, tp + fn, 1.0) >= recall  # falls with the threshold
    return THRESHOLDS[max(int(found.sum()), 1) - 1]


def _ratio(numerator: Tensor, denominator: Tensor, empty: float) -> Tensor:
    numerator, denominator = numerator.double(), denominator.double()
    return torch.where(denominator == 0, empty, numerator / denominator)
