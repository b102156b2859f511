"""Golden values of the metrics of segmentation, at a probability of one half.

segmentation_models_pytorch predicts a pixel whose probability is one half, torchmetrics and milesial do not. What 0 / 0
is differs too: smp's `zero_division` says it, except under `micro`, where it is not a number; torchmetrics has 0,
milesial and we have 1. Each is had from our counts and scores.
"""

import math
from typing import Any

import torch
from torch import Tensor

from metrics.calibration import f_beta, scores
from metrics.segmentation import SegmentationMetrics
from tests.golden_suite.reference import Reference
from tests.golden_suite.suite import Check, GoldenError

VALUE = 2e-6  # relative
MILESIAL = 2e-6  # absolute: its ratios have 1e-6 in numerator and denominator
COUNTS = ("tp", "fp", "fn", "tn")
# Theirs -> ours.
SMP = {
    "iou_score": "iou",
    "f1_score": "dice",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "specificity": "specificity",
}
TORCHMETRICS = {
    "BinaryJaccardIndex": "iou",
    "BinaryF1Score": "dice",
    "BinaryPrecision": "precision",
    "BinaryRecall": "recall",
    "BinaryAccuracy": "accuracy",
}


def compare_smp(reference: Reference, case: str, values: dict[str, Any], check: Check) -> None:
    metric = _measured(reference, case)
    ours = metric.compute()
    counts = _counts(metric)
    for name, expected in values.items():
        what = f"{case}.{name}"
        if name in COUNTS:
            check.equal(what, counts[COUNTS.index(name)].long().tolist(), expected)
        elif name.startswith("fbeta") and name.endswith("_micro_zd1"):
            beta = float(name.removeprefix("fbeta").removesuffix("_micro_zd1"))
            tp, fp, fn, _ = counts.sum(1)
            _close(check, what, f_beta(tp, fp, fn, beta=beta, empty=math.nan), expected)
        elif name == "milesial_dice_per_image_mean_eps1e-6":
            strict = _measured(reference, case, half_is_marked=False).compute()
            check.close(what, strict["dice_per_image"], float(expected), tolerance=MILESIAL)
        elif name in SMP or name == "balanced_accuracy":
            for variant, value in expected.items():
                _close(check, f"{what} {variant}", _reduced(name, counts, variant, reference), value)
            _compare_computed(check, what, SMP.get(name, ""), expected, ours)
        else:
            raise GoldenError(f"{reference.path}: {what} is neither compared nor known not to be ours")


def compare_torchmetrics(reference: Reference, case: str, values: dict[str, float], check: Check) -> None:
    found = scores(*_counts(_measured(reference, case, half_is_marked=False)).sum(1), empty=0.0)
    for name, expected in values.items():
        if name not in TORCHMETRICS:
            raise GoldenError(f"{reference.path}: {case}.{name} is neither compared nor known not to be ours")
        _close(check, f"{case}.{name}", found[TORCHMETRICS[name]], expected)


def _compare_computed(check: Check, what: str, name: str, expected: dict[str, Any], ours: dict[str, Tensor]) -> None:
    """What an epoch with this batch alone reports, where the peer has the same; 0 / 0 is 1 of ours."""
    for key, variant in ((name, "micro|zd=1.0"), (f"{name}_per_image", "micro-imagewise|zd=1.0")):
        if key in ours and variant in expected:
            value = float(expected[variant])
            _close(check, f"{what} {key}", ours[key], 1.0 if math.isnan(value) else value)


def _reduced(name: str, counts: Tensor, variant: str, reference: Reference) -> Tensor:
    """smp's reduction of counts (4, N) of N images of one class, by `<reduction>|zd=<what 0 / 0 is>`."""
    reduction, _, said = variant.partition("|zd=")
    if reduction in ("micro", "macro"):
        counts = counts.sum(1)
    elif reduction not in ("micro-imagewise", "macro-imagewise", "none"):
        raise GoldenError(f"{reference.path}: no case knows the reduction {reduction}")
    found = scores(*counts, empty=math.nan)
    value = (found["recall"] + found["specificity"]) / 2 if name == "balanced_accuracy" else found[SMP[name]]
    if reduction != "micro":
        value = torch.where(value.isnan(), float(said), value)
    return value.mean() if reduction.endswith("imagewise") else value


def _measured(reference: Reference, case: str, *, half_is_marked: bool = True) -> SegmentationMetrics:
    metric = SegmentationMetrics(threshold=0.5)
    probability = reference[f"{case}.logits"].sigmoid()
    if not half_is_marked:
        probability = probability.masked_fill(probability == 0.5, 0.0)
    metric.update(probability=probability, target=reference[f"{case}.target"])
    return metric


def _counts(metric: SegmentationMetrics) -> Tensor:
    """(4, N)"""
    rows = metric.rows()
    return torch.tensor([[row[name] for row in rows] for name in COUNTS])


def _close(check: Check, what: str, actual: Tensor, expected: Any) -> None:
    """Also of values that are not numbers, which the file has as strings; they must be the same ones."""
    wanted = torch.tensor([float(value) for value in expected] if isinstance(expected, list) else float(expected))
    if actual.shape == wanted.shape:
        check.equal(f"{what}: not a number", actual.isnan().tolist(), wanted.isnan().tolist())
    check.close(what, actual.nan_to_num(), wanted.nan_to_num(), tolerance=VALUE, relative=True)
