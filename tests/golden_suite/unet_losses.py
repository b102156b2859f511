"""Golden values and gradients of the losses of segmentation.

The name of a value says the loss and its arguments: `dice_smooth1e-5`, `focal_a0.25_g2.5`,
`focal_tversky_a0.3_b0.7_g1.333`, or, of a weighted sum, `bce0.3_dice0.5_focal0.2(a.25,g2.5)`. A name that does not say
which of our losses it is fails its case.

The peers' overlap losses are unsmoothed and 0 for an empty target unless the name says otherwise; milesial's Dice has
1e-6 in numerator and denominator.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losses.overlap import (
    SegmentationLoss,
    binary_cross_entropy,
    focal_loss,
    lovasz_loss,
    mcc_loss,
    tversky_loss,
)
from tests.golden_suite.reference import Reference
from tests.golden_suite.suite import Check, GoldenError

LOSS = 2e-6  # relative
LOG = 1e-4  # relative, of a logarithm
OVERLAP = 2e-7  # absolute: what rounding makes of 1 - T near 0
GRADIENT = 1e-5  # of the largest magnitude

_overlap = partial(tversky_loss, smooth=0.0, empty="smp")
_PARTS = {"a": "alpha", "b": "beta", "g": "gamma"}
# Name of a loss -> the loss, and what the arguments in a name are called here; None: says what is so anyway.
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, str | None]]] = {
    "bce": (binary_cross_entropy, {"pos_weight": "pos_weight", "logits": None, "mean_over_valid_pixels": None}),
    "softbce": (binary_cross_entropy, {"smooth": "label_smoothing"}),
    "focal": (focal_loss, {"a": "alpha", "g": "gamma", "normalized": "normalized"}),
    "dice": (partial(_overlap, alpha=0.5, beta=0.5), {"smooth": "smooth", "log": "log"}),
    "jaccard": (partial(_overlap, alpha=1.0, beta=1.0), {"smooth": "smooth", "log": "log"}),
    "tversky": (_overlap, _PARTS | {"smooth": "smooth", "log": "log"}),
    "focal_tversky": (_overlap, _PARTS | {"smooth": "smooth"}),
    "lovasz": (lovasz_loss, {"batch": None, "per_image": "per_image"}),
    "mcc": (mcc_loss, {"on_probabilities": None}),
    # (2 TP + e) / (sum p + sum t + e) is T with half of e.
    "milesial_dice": (
        partial(tversky_loss, smooth=5e-7, empty="smooth"),
        {"loss": None, "batch": None, "on_probabilities": None},
    ),
}
# The same of a weighted sum, as arguments of SegmentationLoss.
IN_SUMS = {
    "bce": {"pos_weight": "pos_weight"},
    "dice": {"smooth": "smooth"},
    "jaccard": {"smooth": "smooth"},
    "tversky": {"a": "alpha", "b": "beta", "smooth": "smooth"},
    "focal": {"a": "focal_alpha", "g": "focal_gamma"},
    "lovasz": {},
    "mcc": {},
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
_TERM = rf"(?:{'|'.join(IN_SUMS)}){_NUMBER}(?:\([^()]*\))?"
_OVER_ALL = "_ignore_mean_over_ALL_pixels"  # the peer's mean divides by pixels that it left out, too


def compare(reference: Reference, case: str, values: dict[str, float], check: Check) -> None:
    """The values of one case: of its logits and target."""
    logits, target = reference[f"{case}.logits"], reference[f"{case}.target"]
    for name, expected in values.items():
        actual = _loss(reference, name)(logits, target)
        if name.endswith(_OVER_ALL):
            actual = actual * (target != 255).float().mean()
        _close(check, f"{case}.{name}", actual, float(expected), name)


def compare_gradients(reference: Reference, case: str, check: Check) -> None:
    """`<case>.grad.<loss>`: with respect to the logits."""
    for name, expected in reference.group(f"{case}.grad.").items():
        logits = reference[f"{case}.logits"].clone().requires_grad_()
        (actual,) = torch.autograd.grad(_loss(reference, name)(logits, reference[f"{case}.target"]), logits)
        check.close(f"{case}.grad.{name}", actual, expected, tolerance=GRADIENT, relative=True)


def _close(check: Check, what: str, actual: Tensor, expected: float, name: str) -> None:
    tolerance = LOG if "log" in name.split("_") else LOSS
    is_overlap = any(loss in name for loss in ("dice", "jaccard", "tversky", "mcc"))
    scale = max(abs(expected), OVERLAP / tolerance if is_overlap else torch.finfo(torch.float32).tiny)
    check.close(what, actual.double() / scale, expected / scale, tolerance=tolerance)


def _loss(reference: Reference, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    found = _weighted_sum(name) or _single(name)
    if found is None:
        raise GoldenError(f"{reference.path}: the loss {name} is neither compared nor known not to be ours")
    return found


def _single(name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Of the name of one loss with its arguments."""
    name = name.removesuffix(_OVER_ALL)
    loss = max((loss for loss in LOSSES if re.match(rf"{loss}(_|$)", name)), key=len, default=None)
    if loss is None:
        return None
    function, known = LOSSES[loss]
    arguments = _arguments(name.removeprefix(loss), known, separator="_")
    return None if arguments is None else partial(function, **arguments)


def _weighted_sum(name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Of the name of a sum of losses, each with its weight and perhaps arguments."""
    if not re.fullmatch(rf"{_TERM}(?:_(?:plus_)?{_TERM})*", name):
        return None
    settings: dict[str, Any] = {"bce": 0.0, "dice": 0.0, "smooth": 0.0, "empty": "smp", "reduce": "local"}
    for loss, weight, typed in re.findall(rf"([a-z]+)({_NUMBER})(?:\(([^()]*)\))?", re.sub(r"_(plus_)?", " ", name)):
        arguments = _arguments(f",{typed}" if typed else "", IN_SUMS.get(loss, {}), separator=",")
        if arguments is None:
            return None
        settings |= {loss: float(weight), **arguments}
    loss = SegmentationLoss(**settings)
    return lambda logits, target: loss(logits, target)["loss"]


def _arguments(typed: str, known: dict[str, Any], *, separator: str) -> dict[str, Any] | None:
    """Arguments in what follows a name, such as `_a0.3_b0.7`; None if it says something unknown."""
    arguments: dict[str, Any] = {}
    while typed:
        match = next(
            (
                (ours, match)
                for word, ours in known.items()
                if (match := re.match(rf"{separator}{word}({_NUMBER})?(?={separator}|$)", typed))
            ),
            None,
        )
        if match is None:
            return None
        ours, found = match
        typed = typed[found.end() :]
        if ours is not None:
            arguments[ours] = _number(found[1]) if found[1] else True
    return arguments


def _number(typed: str) -> float:
    """A third that was cut to three digits is a third: 1.333."""
    value, thirds = float(typed), round(3 * float(typed))
    return thirds / 3 if typed == f"{thirds / 3:.3f}" else value
