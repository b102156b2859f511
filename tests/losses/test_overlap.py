"""Segmentation losses: against loops in numpy, gradients, empty and unknown targets, and how batches may be cut."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losses import overlap
from losses.overlap import (
    SegmentationLoss,
    binary_cross_entropy,
    focal_loss,
    lovasz_loss,
    mcc_loss,
    tversky_loss,
)

TERMS = ("bce", "dice", "jaccard", "tversky", "focal", "focal_tversky", "lovasz", "mcc")
Loss = Callable[..., Tensor]


def make_batch(seed: int, *, batch: int = 3, size: int = 7, unknown: float = 0.2) -> tuple[Tensor, Tensor]:
    """Float64 logits and a target, a fifth unknown; the first image has no mark."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 1, size, size + 2)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = (torch.rand(shape, generator=generator) < 0.3).to(torch.uint8)
    target[0] = 0
    target[torch.rand(shape, generator=generator) < unknown] = 255
    return logits, target


def only(name: str, **options: Any) -> SegmentationLoss:
    return SegmentationLoss(**({"bce": 0, "dice": 0} | {name: 1} | options))


def gradient(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, target), logits)[0]


# Values


def by_a_loop(name: str, logits: np.ndarray, target: np.ndarray) -> float:
    """Of the known pixels, (P,) each."""
    p = 1 / (1 + np.exp(-logits))
    nll = -np.log(np.where(target == 1, p, 1 - p))
    p_t = np.exp(-nll)
    tp, fp, fn, tn = (
        (p * target).sum(),
        (p * (1 - target)).sum(),
        ((1 - p) * target).sum(),
        ((1 - p) * (1 - target)).sum(),
    )
    tversky = 1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)
    smooth = 0.1 * (1 - target) + 0.9 * target
    return {
        "bce": nll.mean(),
        "bce weighted": (nll * np.where(target == 1, 3.0, 1.0)).mean(),
        "bce smoothed": -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).mean(),
        "dice": 1 - (2 * tp + 2) / (2 * tp + fp + fn + 2),
        "jaccard": 1 - (tp + 1) / (tp + fp + fn + 1),
        "tversky": tversky,
        "tversky log": -math.log(1 - tversky),
        "focal tversky": tversky**1.5,
        "focal": ((1 - p_t) ** 2 * nll).mean(),
        "focal balanced": (np.where(target == 1, 0.25, 0.75) * (1 - p_t) ** 2.5 * nll).mean(),
        "focal normalized": ((1 - p_t) ** 2 * nll).mean() / ((1 - p_t) ** 2).sum(),
        "mcc": 1 - (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
        "lovasz": greedy_lovasz(1 - logits * (2 * target - 1), target),
    }[name]


def greedy_lovasz(errors: np.ndarray, target: np.ndarray) -> float:
    """The Lovász extension by its definition: a weighted sum of what each pixel adds to the Jaccard loss of a set."""

    def jaccard_loss(wrong: np.ndarray) -> float:
        union = np.count_nonzero((target == 1) | wrong)
        return np.count_nonzero(wrong) / union if union else 0.0

    total, wrong = 0.0, np.zeros(len(errors), bool)
    for pixel in np.argsort(-errors, kind="stable"):
        before = jaccard_loss(wrong)
        wrong[pixel] = True
        total += max(errors[pixel], 0) * (jaccard_loss(wrong) - before)
    return total


CASES: dict[str, Loss] = {
    "bce": binary_cross_entropy,
    "bce weighted": lambda *a, **k: binary_cross_entropy(*a, pos_weight=3.0, **k),
    "bce smoothed": lambda *a, **k: binary_cross_entropy(*a, label_smoothing=0.1, **k),
    "dice": tversky_loss,
    "jaccard": lambda *a, **k: tversky_loss(*a, alpha=1, beta=1, **k),
    "tversky": lambda *a, **k: tversky_loss(*a, alpha=0.3, beta=0.7, **k),
    "tversky log": lambda *a, **k: tversky_loss(*a, alpha=0.3, beta=0.7, log=True, **k),
    "focal tversky": lambda *a, **k: tversky_loss(*a, alpha=0.3, beta=0.7, gamma=1.5, **k),
    "focal": focal_loss,
    "focal balanced": lambda *a, **k: focal_loss(*a, alpha=0.25, gamma=2.5, **k),
    "focal normalized": lambda *a, **k: focal_loss(*a, normalized=True, **k),
    "mcc": mcc_loss,
    "lovasz": lovasz_loss,
}


@pytest.mark.parametrize("name", CASES)
def test_against_a_loop(name: str) -> None:
    logits, target = make_batch(0)
    target[0, 0, 1] = 1  # MCC of an image without marks is what its eps makes it

    def expected(*images: int) -> float:
        known = [target[i].numpy() != 255 for i in images]
        z = np.concatenate([logits[i].numpy()[k] for i, k in zip(images, known, strict=True)])
        t = np.concatenate([target[i].numpy()[k] for i, k in zip(images, known, strict=True)])
        return by_a_loop(name, z, t.astype(float))

    rel = 1e-4 if name == "mcc" else 1e-9
    assert CASES[name](logits, target).item() == pytest.approx(expected(0, 1, 2), rel=rel)
    mean = np.mean([expected(i) for i in range(3)])
    assert CASES[name](logits, target, per_image=True).item() == pytest.approx(mean, rel=rel)


def test_lovasz_of_whole_errors_is_the_jaccard_loss() -> None:
    _, target = make_batch(1, unknown=0)
    wrong = torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    logits = torch.where(wrong, 0.0, 2.0 * target - 1)  # hinge errors of 1 and 0
    marked = target == 1
    expected = 1 - (marked & ~wrong).sum() / (marked | wrong).sum()
    assert lovasz_loss(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)


def test_lovasz_weighs_the_pixels_of_a_large_image_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(1, 1, 300, 400, generator=generator) < 0.03).float()
    # No two errors alike, in float32 neither, so that there is one order.
    logits = (torch.randperm(target.numel(), generator=generator) / 2**20).view(target.shape)
    found = gradient(lovasz_loss, logits, target)
    exact = gradient(lovasz_loss, logits.double(), target)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, per_image: bool) -> None:
    logits, target = make_batch(3, batch=2, size=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: CASES[name](z, target, per_image=per_image), logits, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("marked", [0, 1])
def test_finite_where_everything_is_certain(name: str, marked: int) -> None:
    target = torch.full((2, 1, 3, 3), marked)
    target[1, 0, 0] = 1 - marked
    for sign in (-1, 1):
        for scale in (0.0, 60.0, 1e4):
            logits = sign * scale * (2.0 * target - 1)
            assert CASES[name](logits, target).isfinite()
            assert gradient(CASES[name], logits, target).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_focal_gamma_below_one(gamma: float) -> None:
    logits = torch.tensor([[-200.0, 0.3, 200.0]])
    assert gradient(lambda z, t: focal_loss(z, t, gamma=gamma), logits, torch.tensor([[0, 1, 1]])).isfinite().all()


# Unknown pixels


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_unknown_pixels_do_not_count(name: str, per_image: bool) -> None:
    logits, target = make_batch(4, unknown=0)
    wide = torch.cat([logits, torch.full_like(logits, math.nan)], -1)
    known_as = torch.cat([target, torch.full_like(target, 255)], -1)
    loss = CASES[name]
    expected = loss(logits, target, per_image=per_image).item()
    assert loss(wide, known_as, per_image=per_image).item() == pytest.approx(expected, rel=1e-12)
    found = gradient(lambda z, t: loss(z, t, per_image=per_image), wide, known_as)
    assert not found[..., logits.shape[-1] :].any()
    assert found[..., : logits.shape[-1]].any()


@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_known_is_no_loss(per_image: bool) -> None:
    target = torch.full((2, 1, 3, 3), 255)
    loss = SegmentationLoss(**{term: 0 if term == "mcc" else 1 for term in TERMS}, per_image=per_image)
    logits = torch.randn(target.shape)
    assert loss(logits, target)["loss"].item() == 0
    assert not gradient(lambda z, t: loss(z, t)["loss"], logits, target).any()


# Empty targets


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("term", ["dice", "jaccard", "tversky", "focal_tversky"])
def test_false_alarms_on_a_clean_image_cost_something(term: str, per_image: bool) -> None:
    logits, target = torch.full((2, 1, 4, 4), 3.0), torch.zeros(2, 1, 4, 4)
    loss = only(term, per_image=per_image)
    slope = gradient(lambda z, t: loss(z, t)["loss"], logits, target)
    before = loss(logits, target)["loss"]
    assert before > 0.5 and (slope > 0).all()
    assert loss(logits - 100 * slope, target)["loss"] < before
    for empty in ("smp", "skip"):
        without = only(term, per_image=per_image, empty=empty)
        assert without(logits, target)["loss"].item() == 0
        assert not gradient(lambda z, t, without=without: without(z, t)["loss"], logits, target).any()


def test_what_becomes_of_an_empty_image_among_others() -> None:
    logits, target = make_batch(5)  # the first is empty
    alone = [tversky_loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    per_image = {empty: tversky_loss(logits, target, empty=empty, per_image=True) for empty in overlap.EMPTY}
    torch.testing.assert_close(per_image["smooth"], sum(alone) / 3)
    torch.testing.assert_close(per_image["smp"], (alone[1] + alone[2]) / 3)
    torch.testing.assert_close(per_image["skip"], (alone[1] + alone[2]) / 2)
    whole = {empty: tversky_loss(logits, target, empty=empty) for empty in overlap.EMPTY}
    torch.testing.assert_close(whole["smp"], whole["smooth"])
    torch.testing.assert_close(whole["skip"], tversky_loss(logits[1:], target[1:]))
    assert whole["skip"] < whole["smooth"]


# How batches are cut


@pytest.mark.parametrize("name", CASES)
def test_per_image_two_small_batches_are_one_large(name: str) -> None:
    logits, target = make_batch(6, batch=4)
    whole = CASES[name](logits, target, per_image=True)
    parts = [CASES[name](logits[i : i + 2], target[i : i + 2], per_image=True) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-14, atol=0)


class Processes:
    """Stands for as many processes as there are batches: they meet in `_all_reduce`, in the order of their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.sums: list[list[Tensor]] = [[] for _ in range(size)]
        self.rank, self.sharing, self.turn = 0, False, 0
        monkeypatch.setattr(overlap, "_world_size", lambda: size)
        monkeypatch.setattr(overlap, "_all_reduce", self.all_reduce)

    def all_reduce(self, own: Tensor) -> Tensor:
        if not self.sharing:
            self.sums[self.rank].append(own)
            return own
        total = sum(sums[self.turn] for sums in self.sums)
        self.turn += 1
        return total

    def run(self, loss: SegmentationLoss, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Loss and gradient of each. Sums that depend on others' sums would need more rounds; here are none."""
        for self.rank, batch in enumerate(batches):
            loss(batch[0].requires_grad_(), batch[1])
        self.sharing = True
        results = []
        for logits, target in batches:
            self.turn = 0
            value = loss(logits, target)["loss"]
            results.append((value, torch.autograd.grad(value, logits)[0]))
        return results


@pytest.mark.parametrize("options", [{}, {"per_image": True}, {"empty": "skip"}, {"empty": "skip", "per_image": True}])
@pytest.mark.parametrize("term", [term for term in TERMS if term != "lovasz"])
def test_processes_are_one_with_their_batches_together(
    monkeypatch: pytest.MonkeyPatch, term: str, options: dict[str, Any]
) -> None:
    # 3 images, 1 of them empty, and 2 of which both may have marks: per image, ranks divide by different numbers too.
    batches = [make_batch(7), tuple(x[1:] for x in make_batch(8))]
    loss = only(term, pos_weight=2.0, focal_normalized=True, log=True, **options)
    logits, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = loss(logits, target)["loss"].item()
    slope = gradient(lambda z, t: loss(z, t)["loss"], logits, target)
    results = Processes(monkeypatch, 2).run(loss, batches)
    for value, _ in results:
        assert value.item() == pytest.approx(expected, rel=1e-12)
    # Each image's parameters' gradient comes from its own process; DDP takes the mean, here over 2.
    found = torch.cat([own for _, own in results]) / 2
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-15)
    local = only(term, reduce="local", pos_weight=2.0, focal_normalized=True, log=True, **options)
    assert local(*batches[1])["loss"].item() != pytest.approx(expected, rel=1e-3)


def test_nothing_is_communicated_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make_batch(0)
    loss = SegmentationLoss()
    expected = loss(logits, target)["loss"]
    monkeypatch.setattr(overlap, "_world_size", lambda: 2)

    def refuse(own: Tensor) -> Tensor:
        raise AssertionError("communicated")

    monkeypatch.setattr(overlap, "_all_reduce", refuse)
    with torch.no_grad():
        assert loss(logits, target)["loss"] == expected
    assert SegmentationLoss(reduce="local")(logits.requires_grad_(), target)["loss"] == expected
    with pytest.raises(AssertionError, match="communicated"):
        loss(logits, target)


# The module


def test_a_weighted_sum_of_what_is_in_use() -> None:
    logits, target = make_batch(9)
    loss = SegmentationLoss(bce=0.3, dice=0.5, focal=0.2, focal_alpha=0.25, focal_gamma=2.5)
    found = loss(logits.requires_grad_(), target)
    assert set(found) == {"loss", "bce", "dice", "focal"}
    assert [value.requires_grad for value in found.values()] == [True, False, False, False]
    expected = 0.3 * binary_cross_entropy(logits, target) + 0.5 * tversky_loss(logits, target)
    expected = expected + 0.2 * focal_loss(logits, target, alpha=0.25, gamma=2.5)
    torch.testing.assert_close(found["loss"], expected)
    assert set(SegmentationLoss(**dict.fromkeys(TERMS, 1))(logits, target)) == {"loss", *TERMS}


OPTIONS = [
    ("bce", {"pos_weight": 3.0}, "bce weighted"),
    ("bce", {"label_smoothing": 0.1}, "bce smoothed"),
    ("jaccard", {}, "jaccard"),
    ("tversky", {"alpha": 0.3, "beta": 0.7}, "tversky"),
    ("tversky", {"alpha": 0.3, "beta": 0.7, "log": True}, "tversky log"),
    ("focal_tversky", {"alpha": 0.3, "beta": 0.7, "gamma_tversky": 1.5}, "focal tversky"),
    ("focal", {"focal_alpha": 0.25, "focal_gamma": 2.5}, "focal balanced"),
    ("focal", {"focal_normalized": True}, "focal normalized"),
]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(("term", "options", "case"), OPTIONS, ids=[case for *_, case in OPTIONS])
def test_options_reach_their_loss(term: str, options: dict[str, Any], case: str, per_image: bool) -> None:
    logits, target = make_batch(10)
    found = only(term, per_image=per_image, **options)(logits, target)["loss"]
    torch.testing.assert_close(found, CASES[case](logits, target, per_image=per_image))


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    logits, target = make_batch(11)
    loss = SegmentationLoss(**dict.fromkeys(TERMS, 1))
    half = logits.bfloat16()
    expected = loss(half.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(half, target)
    assert {name: value.item() for name, value in found.items()} == {k: v.item() for k, v in expected.items()}
    assert all(value.dtype == torch.float32 for value in found.values())
    assert loss(logits, target)["loss"].dtype == torch.float64


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device: to read a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "index"}:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_image", [False, True])
def test_the_host_never_waits(per_image: bool) -> None:
    loss = SegmentationLoss(**dict.fromkeys(TERMS, 1), per_image=per_image, empty="skip", focal_normalized=True)
    logits, target = make_batch(12)
    with NoReading():
        gradient(lambda z, t: loss(z, t)["loss"], logits, target)
        with pytest.raises(AssertionError, match="waits"):
            logits[target == 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bce": 0, "dice": 0}, "bce: at least one weight must be positive"),
        ({"lovasz": -1}, "lovasz must be a number, at least 0"),
        ({"dice": math.nan}, "dice must be a number"),
        ({"focal": "a lot"}, "focal must be a number"),
        ({"bce": True}, "bce must be a number"),
        ({"smooth": 0}, "smooth must be above 0, or empty smp or skip"),
        ({"smooth": -1}, "smooth must be a number"),
        ({"empty": "zero"}, "empty must be one of smooth, smp, skip, got 'zero'"),
        ({"reduce": "mean"}, "reduce must be one of global, local"),
        ({"per_image": "yes"}, "per_image must be true or false, got 'yes'"),
        ({"log": 1}, "log must be true or false"),
        ({"focal_normalized": None}, "focal_normalized must be true or false"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"beta": math.inf}, "beta must be"),
        ({"gamma_tversky": 0.75}, "gamma_tversky must be a number, at least 1"),
        ({"focal_alpha": 1.5}, "focal_alpha must be a number, at least 0 and at most 1"),
        ({"focal_gamma": -1}, "focal_gamma must be"),
        ({"label_smoothing": 0.6}, "label_smoothing must be"),
        ({"pos_weight": -1}, "pos_weight must be"),
    ],
)
def test_what_makes_no_loss(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SegmentationLoss(**options)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"one shape .*got \(2, 1, 4, 4\) and \(2, 4, 4\)"):
        SegmentationLoss()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
