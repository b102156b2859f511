"""How well marks were found, over a whole epoch: pixels, images, boundaries, and how much of a false alarm there was.

Counts are integers of the whole epoch, so nothing depends on how images were put into batches, or on which process saw
them. `micro` scores are those of all pixels together, and large marks rule them; per image, each image counts as much
as any other. What 0 / 0 is, and so what an empty mask scores, says metrics/calibration.py. Pixels whose target is 255
are unknown and count nowhere; an image without any other pixel is left out.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchmetrics import Metric

from metrics.calibration import (
    NUM_BINS,
    THRESHOLDS,
    UNKNOWN,
    calibrated_threshold,
    probability_histogram,
    scores,
)

FALSE_ALARM_SHARE = 1000  # one pixel in so many makes a clean image a false alarm


@torch.no_grad()
def boundary_f(predicted: Tensor, target: Tensor, *, pixels: int = 2) -> Tensor:
    """F1 of the boundaries of two masks: precision is the share of the outermost pixels of *predicted* that have one of
    *target* within so many pixels (Chebyshev), recall the same the other way. 1 if neither mask has any, 0 if only one.

    Where the image, or what is known of it, ends there is no boundary, so padding changes nothing. After Csurka et al.,
    "What is a good evaluation measure for semantic segmentation?", 2013.

    Shape: (…, H, W) bool, (…, H, W) with 0, 1 and 255: unknown -> (…) float64.
    """
    known = target != UNKNOWN
    first, second = (_boundary(mask & known, ~mask & known) for mask in (predicted, target == 1))

    def share(edge: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        total = edge.sum((-2, -1))
        return (edge & _dilated(other, pixels)).sum((-2, -1)) / total.clamp_min(1).double(), total

    (precision, num_predicted), (recall, num_target) = share(first, second), share(second, first)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(num_predicted + num_target == 0, 1.0, f1)


def auroc(score: Tensor, marked: Tensor) -> Tensor:
    """The probability that a marked image scores above a clean one, a tie being half of it; 0.5 if one kind is missing.

    Shape: (N,), (N,) bool -> () float64.
    """
    positive, negative = score[marked], score[~marked].sort().values
    num_pairs = len(positive) * len(negative)
    if not num_pairs:
        return torch.tensor(0.5, dtype=torch.float64, device=score.device)
    won = torch.searchsorted(negative, positive).sum()
    won_or_tied = torch.searchsorted(negative, positive, right=True).sum()
    return (won + won_or_tied).double() / (2 * num_pairs)


class SegmentationMetrics(Metric):
    """Scores of an epoch, over all batches and processes.

    `compute()` returns float32 scalars, all finite:
    * `iou`, `dice`, `precision`, `recall`, `specificity`, `accuracy`: of all pixels together (micro);
    * `iou_per_image`, `dice_per_image`: means over images; `iou_marked`: over images with marks (1 if there is none);
    * `false_alarm_rate`: share of the images without marks in which a thousandth of the pixels or more are predicted (0
      if there is none); `num_marked`, `num_clean`: how many images there are of both;
    * `auroc`: of the largest probability in an image, for telling images with marks from those without;
    * with *boundary*, `boundary_f`: mean over images in which anything is marked or predicted (1 if there is none);
    * `threshold`: the one that was used.

    *threshold*: a pixel is predicted where its probability is at least this, one of the THRESHOLDS; None: that of .05,
    .10 … .95 with the largest F1 on the pixels of this epoch. *boundary*: needs a threshold from the start, and time.
    """

    full_state_update = False

    histograms: list[Tensor]
    largest: list[Tensor]
    outlines: list[Tensor]

    def __init__(self, *, threshold: float | None = None, boundary: bool = False) -> None:
        super().__init__()
        if threshold is not None and threshold not in THRESHOLDS:
            raise ValueError(f"threshold must be one of .01, .02 … .99, got {threshold}")
        if boundary and threshold is None:
            raise ValueError("boundary needs a threshold")
        self.threshold = threshold
        self.boundary = boundary
        # Of each image. All counts at all thresholds follow from the histograms, exactly.
        self.add_state("histograms", [], dist_reduce_fx="cat")
        self.add_state("largest", [], dist_reduce_fx="cat")
        self.add_state("outlines", [], dist_reduce_fx="cat")

    def update(self, *, probability: Tensor, target: Tensor) -> None:
        """Shape: probability (N, 1, H, W), target (N, 1, H, W) with 0, 1 and 255: unknown."""
        if probability.shape != target.shape or probability.ndim != 4 or probability.shape[1] != 1:
            raise ValueError(
                "probability and target must both have shape (batch, 1, height, width), "
                f"got {tuple(probability.shape)} and {tuple(target.shape)}"
            )
        probability = probability.detach().to(torch.promote_types(probability.dtype, torch.float32))
        self.histograms.append(
            torch.stack([probability_histogram(*one) for one in zip(probability, target, strict=True)])
        )
        self.largest.append(probability.masked_fill(target == UNKNOWN, 0.0).flatten(1).amax(1).float())
        if self.boundary:
            self.outlines.append(boundary_f(probability >= self.threshold, target).flatten())

    def rows(self) -> list[dict[str, float]]:
        """One for each image of the last update: counts `tp`, `fp`, `fn`, `tn`, then `iou`, `dice`, `precision`,
        `recall`, with *boundary* `boundary_f`, and `max_probability`."""
        counts = _counts(self.histograms[-1], self.threshold or 0.5)
        columns = dict(zip(("tp", "fp", "fn", "tn"), counts.T, strict=True))
        values = scores(*counts.T)
        columns |= {name: values[name] for name in ("iou", "dice", "precision", "recall")}
        if self.boundary:
            columns["boundary_f"] = self.outlines[-1]
        columns["max_probability"] = self.largest[-1]
        lists = {name: column.tolist() for name, column in columns.items()}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]

    def histogram(self) -> Tensor:
        """How many pixels of each class have which probability, as metrics/calibration.py has it, of all processes
        together: all have to call it.

        Shape: (2, 100) int64.
        """
        with self.sync_context():
            return _joined(self.histograms, torch.zeros(0, 2, NUM_BINS, dtype=torch.int64)).sum(0)

    def compute(self) -> dict[str, Tensor]:
        histograms = _joined(self.histograms, torch.zeros(0, 2, NUM_BINS, dtype=torch.int64))
        known = histograms.sum((1, 2)) > 0  # an image without any known pixel is left out
        histograms = histograms[known]
        threshold = calibrated_threshold(histograms.sum(0)) if self.threshold is None else self.threshold
        counts = _counts(histograms, threshold)  # (N, 4)
        tp, fp, fn, _ = counts.T
        marked = tp + fn > 0
        values, of_images = scores(*counts.sum(0)), scores(*counts.T)
        alarms = ~marked & (FALSE_ALARM_SHARE * fp >= counts.sum(1))
        largest = _joined(self.largest, torch.zeros(0))[known]
        values |= {
            "iou_per_image": of_images["iou"].mean() if len(counts) else torch.tensor(0.0),
            "dice_per_image": of_images["dice"].mean() if len(counts) else torch.tensor(0.0),
            "iou_marked": _mean(of_images["iou"], marked),
            "false_alarm_rate": alarms.sum() / (~marked).sum().clamp_min(1),
            "num_marked": marked.sum(),
            "num_clean": (~marked).sum(),
            "auroc": auroc(largest, marked),
            "threshold": torch.tensor(threshold),
        }
        if self.boundary:
            outlines = _joined(self.outlines, torch.zeros(0, dtype=torch.float64))[known]
            values["boundary_f"] = _mean(outlines, tp + fp + fn > 0)
        return {name: value.float() for name, value in values.items()}


def _counts(histograms: Tensor, threshold: float) -> Tensor:
    """TP, FP, FN and TN of each image. Shape: (N, 2, 100) -> (N, 4)."""
    reached = histograms[:, :, THRESHOLDS.index(threshold) + 1 :].sum(2)  # (N, 2): pixels of both classes
    below = histograms.sum(2) - reached
    return torch.stack([reached[:, 1], reached[:, 0], below[:, 1], below[:, 0]], dim=1)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """1 where there is nothing to take the mean of. Shape: (N,), (N,) -> ()."""
    total = torch.where(chosen, values, 0.0).sum()
    return torch.where(chosen.any(), total / chosen.sum().clamp_min(1), 1.0)


def _joined(state: list[Tensor] | Tensor, nothing: Tensor) -> Tensor:
    """What was gathered from all processes is one tensor already."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else nothing


def _boundary(mask: Tensor, outside: Tensor) -> Tensor:
    """The pixels of *mask* that touch *outside*, also by a corner. Shape: (…, H, W) bool each."""
    return mask & _dilated(outside, 1)


def _dilated(mask: Tensor, pixels: int) -> Tensor:
    images = mask.reshape(-1, 1, *mask.shape[-2:]).float()  # (N, 1, H, W)
    return max_pool2d(images, 2 * pixels + 1, stride=1, padding=pixels).view(mask.shape) > 0
