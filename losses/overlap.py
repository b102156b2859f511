"""Losses of binary segmentation: cross-entropy, focal, and those that measure how far two masks overlap.

Of logits z and a target t in {0, 1}, with p = sigmoid(z) and the soft counts

    TP = sum p t    FP = sum p (1 - t)    FN = sum (1 - p) t    TN = sum (1 - p) (1 - t)

over all pixels of the batch, or per image with the mean over images (`per_image`). Pixels whose target is 255 are
unknown and left out everywhere: sums skip them, means divide by the number of the others. Computed in float32 at
least, also inside autocast, and the host never waits for the device.

What is peculiar to overlap is the image without any mark: TP is 0 whatever is predicted, so without smoothing there is
nothing to learn from it. `empty` says what becomes of it:
* smooth: nothing special. T = s / (alpha FP + s): with s above 0 every false alarm costs something.
* smp: where the target of the whole batch (per image: of an image) is empty the loss is 0, without gradient, even if
  every pixel was predicted. As segmentation_models_pytorch has it.
* skip: images with an empty target do not count: their pixels are in no sum and, per image, they are not in the number
  that the mean divides by. 0 if there is no other.

A ratio of sums over a batch is not the mean of those over its parts. With `reduce="global"` the sums are those of the
batches of all processes together, and loss and gradient are those of one process with the large batch; accumulation
of micro-batches is the same as one large batch with `per_image` only.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

UNKNOWN = 255
EMPTY = ("smooth", "smp", "skip")
REDUCE = ("global", "local")
_MIN_SCORE = 1e-7  # as in segmentation_models_pytorch, and like the next two part of the values it gives
_MCC_EPS = 1e-5
_MIN_NORMALIZER = 1e-6


def binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: float | None = None,
    label_smoothing: float = 0.0,
    per_image: bool = False,
    reduce: str = "local",
) -> Tensor:
    """Mean over pixels of w t softplus(-z) + (1 - t) softplus(z), with w = *pos_weight* or 1.

    *label_smoothing*: the target becomes this for unmarked pixels, and 1 minus this for marked ones.

    Shape: (N, 1, H, W), (N, 1, H, W) -> ().
    """
    logits, target, known = _pixels(logits, target)
    target = target * (1 - label_smoothing) + (1 - target) * label_smoothing
    weight = None if pos_weight is None else logits.new_full((), pos_weight)
    error = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none") * known
    total, count = _sums(error, known, per_image=per_image, reduce=reduce)
    return _mean(total / count.clamp_min(1), per_image=per_image, reduce=reduce)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    normalized: bool = False,
    per_image: bool = False,
    reduce: str = "local",
) -> Tensor:
    """Cross-entropy that looks away from what is right already: mean of a_t (1 - p_t)^gamma BCE, with p_t = exp(-BCE).

    Lin et al., "Focal loss for dense object detection", 2017, equation 5. *alpha*: a_t is alpha for marked pixels and
    1 - alpha for others; None: 1. *normalized*: divided by the sum of (1 - p_t)^gamma also, after Bulo et al.'s idea
    as segmentation_models_pytorch has it: still a mean over pixels, so the value is small.

    Shape: (N, 1, H, W), (N, 1, H, W) -> ().
    """
    logits, target, known = _pixels(logits, target)
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # expm1, since 1 - exp(-x) of a small x is rounding; the bound, since the slope of x^gamma may have a pole at 0.
    focus = (-torch.expm1(-error)).clamp_min(1e-12).pow(gamma) * known
    balance = 1.0 if alpha is None else alpha * target + (1 - alpha) * (1 - target)
    total, normalizer, count = _sums(balance * focus * error, focus, known, per_image=per_image, reduce=reduce)
    value = total / count.clamp_min(1)
    if normalized:
        value = value / normalizer.clamp_min(_MIN_NORMALIZER)
    return _mean(value, per_image=per_image, reduce=reduce)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    smooth: float = 1.0,
    empty: str = "smooth",
    log: bool = False,
    per_image: bool = False,
    reduce: str = "local",
) -> Tensor:
    """(1 - T)^gamma with the index T = (TP + s) / (TP + alpha FP + beta FN + s) of Salehi et al. 2017.

    *alpha* weighs false alarms, *beta* misses: 0.5 and 0.5 is Dice, 1 and 1 Jaccard. *gamma* above 1 is the focal
    Tversky loss. *smooth* is s; since it stands with TP, not with 2 TP, 1 here is 2 in the usual form of Dice. *log*:
    -ln T in place of 1 - T. *empty*: see above.

    Shape: (N, 1, H, W), (N, 1, H, W) -> ().
    """
    tp, fp, fn, _ = _soft_counts(logits, target, only_marked=empty == "skip", per_image=per_image, reduce=reduce)
    score = (tp + smooth) / (tp + alpha * fp + beta * fn + smooth).clamp_min(_MIN_SCORE)
    loss = -score.clamp_min(_MIN_SCORE).log() if log else 1 - score
    if gamma != 1:
        loss = loss.clamp_min(0).pow(gamma)  # rounding may leave 1 - T below 0, where there is no power
    marked = tp + fn > 0
    if empty != "smooth":
        loss = torch.where(marked, loss, 0.0)
    return _mean(loss, counted=marked if empty == "skip" else None, per_image=per_image, reduce=reduce)


def lovasz_loss(logits: Tensor, target: Tensor, *, per_image: bool = False) -> Tensor:
    """The Lovász hinge: the convex extension of the Jaccard loss to the hinge errors 1 - z (2t - 1).

    Berman et al., "The Lovász-softmax loss", 2018, section 3. It sorts all pixels, so over several processes there is
    no sum to share: each takes its own batch (or images), and the step the mean of these.

    Shape: (N, 1, H, W), (N, 1, H, W) -> ().
    """
    logits, target, known = _pixels(logits, target)
    if not per_image:
        logits, target, known = (x.reshape(1, -1) for x in (logits, target, known))  # (1, N H W)
    # Unknown pixels come last, and what comes last changes no weight before it; the hinge makes them 0.
    errors = (1 - logits * (2 * target - 1)).masked_fill(~known, -math.inf)
    errors, order = errors.sort(dim=1, descending=True)
    return (F.relu(errors) * _jaccard_steps(target.gather(1, order))).sum(1).mean()


def mcc_loss(logits: Tensor, target: Tensor, *, per_image: bool = False, reduce: str = "local") -> Tensor:
    """1 - Matthews correlation coefficient of probabilities and target (Abhishek and Hamarneh, 2021).

    Shape: (N, 1, H, W), (N, 1, H, W) -> ().
    """
    tp, fp, fn, tn = _soft_counts(logits, target, per_image=per_image, reduce=reduce) + _MCC_EPS
    scale = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
    return _mean(1 - (tp * tn - fp * fn) / scale, per_image=per_image, reduce=reduce)


class SegmentationLoss(nn.Module):
    """A weighted sum of the losses above.

    *bce*, *dice*, *jaccard*, *tversky*, *focal*, *focal_tversky*, *lovasz*, *mcc*: the weights; a loss of weight 0 is
    not computed. *pos_weight* and *label_smoothing* belong to bce; *smooth* and *empty* to dice, jaccard, tversky and
    focal_tversky, *log* to the first three of them; *alpha* and *beta* to tversky and focal_tversky, *gamma_tversky*
    to the latter; *focal_alpha*, *focal_gamma* and *focal_normalized* to focal.

    *per_image*: the mean over images of each image's loss, instead of one of all pixels. *reduce*: `global` or
    `local`, over which processes sums are taken while training (lovasz: always `local`). Without gradients nothing is
    communicated: each process has the loss of its own batch.

    `forward` returns `loss` and, detached, each loss in use by its name.

    Shape: (N, 1, H, W), (N, 1, H, W) -> () each.
    """

    def __init__(
        self,
        *,
        bce: float = 0.5,
        dice: float = 0.5,
        jaccard: float = 0.0,
        tversky: float = 0.0,
        focal: float = 0.0,
        focal_tversky: float = 0.0,
        lovasz: float = 0.0,
        mcc: float = 0.0,
        pos_weight: float | None = None,
        smooth: float = 1.0,
        empty: str = "smooth",
        log: bool = False,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma_tversky: float = 1.333,
        focal_alpha: float | None = None,
        focal_gamma: float = 2.0,
        focal_normalized: bool = False,
        label_smoothing: float = 0.0,
        per_image: bool = False,
        reduce: str = "global",
    ) -> None:
        super().__init__()
        weights = {
            "bce": bce,
            "dice": dice,
            "jaccard": jaccard,
            "tversky": tversky,
            "focal": focal,
            "focal_tversky": focal_tversky,
            "lovasz": lovasz,
            "mcc": mcc,
        }
        for name, weight in weights.items():
            _check_number(name, weight)
        if not any(weights.values()):
            raise ValueError(f"bce: at least one weight must be positive, of {', '.join(weights)}")
        _check_number("smooth", smooth)
        _check_number("alpha", alpha)
        _check_number("beta", beta)
        _check_number("gamma_tversky", gamma_tversky, least=1.0)  # below, the slope at a perfect answer is infinite
        _check_number("focal_gamma", focal_gamma)
        _check_number("label_smoothing", label_smoothing, most=0.5)
        if pos_weight is not None:
            _check_number("pos_weight", pos_weight)
        if focal_alpha is not None:
            _check_number("focal_alpha", focal_alpha, most=1.0)
        for name, value, known in (("empty", empty, EMPTY), ("reduce", reduce, REDUCE)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, value in (("log", log), ("focal_normalized", focal_normalized), ("per_image", per_image)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if empty == "smooth" and smooth == 0:
            # An empty target would cost 1 whatever is predicted.
            raise ValueError("smooth must be above 0, or empty smp or skip: nothing is learned from empty targets")
        over = {"per_image": per_image, "reduce": reduce}
        overlap = partial(tversky_loss, smooth=smooth, empty=empty, **over)
        losses = {
            "bce": partial(binary_cross_entropy, pos_weight=pos_weight, label_smoothing=label_smoothing, **over),
            "dice": partial(overlap, alpha=0.5, beta=0.5, log=log),
            "jaccard": partial(overlap, alpha=1.0, beta=1.0, log=log),
            "tversky": partial(overlap, alpha=alpha, beta=beta, log=log),
            "focal": partial(focal_loss, alpha=focal_alpha, gamma=focal_gamma, normalized=focal_normalized, **over),
            "focal_tversky": partial(overlap, alpha=alpha, beta=beta, gamma=gamma_tversky),
            "lovasz": partial(lovasz_loss, per_image=per_image),
            "mcc": partial(mcc_loss, **over),
        }
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        self.per_image, self.reduce = per_image, reduce
        self._losses = {name: losses[name] for name in self.weights}

    def forward(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        terms = {name: loss(logits, target) for name, loss in self._losses.items()}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": total} | {name: term.detach() for name, term in terms.items()}


def _pixels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and which pixels are known, (N, pixels) each; 0 in both where they are not."""
    if logits.shape != target.shape or logits.ndim < 2:
        raise ValueError(
            "logits and target must have one shape (batch, 1, height, width), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    known = (target != UNKNOWN).flatten(1)
    # Filled, not multiplied: what is not finite there must not pass either.
    logits = logits.flatten(1).to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~known, 0.0)
    return logits, target.flatten(1).to(logits.dtype).masked_fill(~known, 0.0), known


def _soft_counts(logits: Tensor, target: Tensor, *, per_image: bool, reduce: str, only_marked: bool = False) -> Tensor:
    """TP, FP, FN, TN of the batch, (4, 1), or of each image, (4, N). *only_marked*: 0 for images without marks."""
    logits, target, known = _pixels(logits, target)
    if only_marked:
        known = known & (target > 0).any(1, keepdim=True)
    p, clean = logits.sigmoid(), known.to(logits.dtype) - target
    return _sums(p * target, p * clean, (1 - p) * target, (1 - p) * clean, per_image=per_image, reduce=reduce)


def _sums(*values: Tensor, per_image: bool, reduce: str) -> Tensor:
    """Sums over the batch, (K, 1), or over each image, (K, N), of K values per pixel, each (N, pixels)."""
    sums = torch.stack([value.sum(1, dtype=values[0].dtype) for value in values])
    return sums if per_image else _over_processes(sums.sum(1, keepdim=True), reduce)


def _mean(values: Tensor, *, per_image: bool, reduce: str, counted: Tensor | None = None) -> Tensor:
    """Of the batch, (1,), the value; of images, (N,), the mean over those that are *counted*, None: all."""
    if not per_image:
        return values.squeeze(0)
    counted = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    total, count = _over_processes(torch.stack([(values * counted).sum(), counted.sum()]), reduce)
    return total / count.clamp_min(1)


def _over_processes(own: Tensor, reduce: str) -> Tensor:
    """The sum over all processes of each one's *own*, such that the gradient is right once DDP has averaged it.

    With S = sum_r own_r over W processes, each computes L = f(S), and its backward reaches its own parameters' copy by
    its own part only: f'(S) d own_r. DDP takes the mean over r, f'(S) dS / W, which is too small by W. So the own part
    is to have the slope W: S = all_reduce(own) + W (own - detach(own)), where the bracket is 0.

    Without gradients nothing is summed, so processes need not have the same number of batches there.
    """
    if reduce == "local" or not torch.is_grad_enabled() or (size := _world_size()) == 1:
        return own
    return _all_reduce(own.detach()) + size * (own - own.detach())


def _world_size() -> int:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def _all_reduce(own: Tensor) -> Tensor:
    total = own.clone()
    torch.distributed.all_reduce(total)
    return total


@torch.no_grad()
def _jaccard_steps(target: Tensor) -> Tensor:
    """What each pixel, in order of falling error, adds to the Jaccard loss when it is got wrong too.

    With I marked pixels not yet wrong and U marked or wrongly marked ones, both after the pixel: a marked one takes 1
    from I, which is 1 / U; another adds 1 to U, which is I / (U - 1) - I / U = I / (U (U - 1)). Not as a difference of
    the cumulative loss: in float32 nothing would be left of steps of a millionth.

    Shape: (G, P) -> (G, P).
    """
    marked = target.sum(1, keepdim=True)
    marked_so_far = target.cumsum(1)
    place = torch.arange(1, target.shape[1] + 1, device=target.device, dtype=target.dtype)
    intersection = marked - marked_so_far
    union = marked + place - marked_so_far
    steps = torch.where(target > 0, 1 / union, intersection / (union * (union - 1)))
    # Nothing marked: the first wrong pixel takes the loss from 0 to 1.
    first = torch.zeros_like(target)
    first[:, :1] = 1
    return torch.where(marked > 0, steps, first)


def _check_number(name: str, value: Any, *, least: float = 0.0, most: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and least <= value <= most and math.isfinite(value)):
        most_said = "" if math.isinf(most) else f" and at most {most:g}"
        raise ValueError(f"{name} must be a number, at least {least:g}{most_said}, got {value!r}")
