"""Metrics of masked prediction: against a loop in numpy, what is known beforehand, and merging of ranks."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics.masked_prediction import MaskedPredictionMetrics

BOOKS, CLASSES, FRAMES = 2, 6, 9
KEYS = {
    "accuracy",
    "constant_accuracy",
    "perplexity",
    "codebook_usage",
    "codebook_perplexity",
    "masked_share",
    "empty_batches",
}


def metric() -> MaskedPredictionMetrics:
    return MaskedPredictionMetrics(num_books=BOOKS, num_classes=CLASSES)


def make_batch(seed: int, *, batch: int = 3, share: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(batch, FRAMES, CLASSES, BOOKS, generator=generator).log_softmax(2)
    # Skewed, so that the most frequent class stands out; the last class never occurs.
    targets = (torch.rand(batch, FRAMES, BOOKS, generator=generator).square() * (CLASSES - 1)).long()
    valid = torch.arange(FRAMES) < torch.randint(3, FRAMES + 1, (batch, 1), generator=generator)
    selected = valid & (torch.rand(batch, FRAMES, generator=generator) < share)
    nll = -log_probs.gather(2, targets.unsqueeze(2)).squeeze(2).mean(-1)
    return {
        "log_probs": log_probs,
        "targets": targets,
        "selected": selected,
        "valid": valid,
        "nll_sum": nll[selected].sum(),
    }


def by_a_loop(batches: list[dict[str, Tensor]]) -> dict[str, float]:
    right, chosen, losses, empty = 0, [Counter() for _ in range(BOOKS)], [], 0
    seen = [Counter() for _ in range(BOOKS)]
    num_selected = num_valid = 0
    for batch in batches:
        values: dict[str, Any] = {name: value.numpy() for name, value in batch.items()}
        empty += not values["selected"].any()
        for b, t in np.ndindex(values["selected"].shape):
            num_valid += values["valid"][b, t]
            num_selected += values["selected"][b, t]
            for book in range(BOOKS):
                token = int(values["targets"][b, t, book])
                if values["valid"][b, t]:
                    seen[book][token] += 1
                if values["selected"][b, t]:
                    chosen[book][token] += 1
                    right += int(np.argmax(values["log_probs"][b, t, :, book])) == token
                    losses.append(-values["log_probs"][b, t, token, book])
    entropies = [-sum(n / c.total() * math.log(n / c.total()) for n in c.values()) for c in seen]
    return {
        "accuracy": right / (num_selected * BOOKS),
        "constant_accuracy": sum(max(c.values()) for c in chosen) / (num_selected * BOOKS),
        "perplexity": math.exp(np.mean(losses)),
        "codebook_usage": float(np.mean([len(c) / CLASSES for c in seen])),
        "codebook_perplexity": float(np.mean(np.exp(entropies))),
        "masked_share": num_selected / num_valid,
        "empty_batches": empty,
    }


def numbers(metric: MaskedPredictionMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_against_a_loop() -> None:
    batches = [make_batch(0), make_batch(1, batch=1), make_batch(2, share=0.0)]
    found = metric()
    for batch in batches:
        found.update(**batch)
    expected = by_a_loop(batches)
    assert set(expected) == KEYS
    assert expected["codebook_usage"] < 1 and expected["empty_batches"] == 1
    assert numbers(found) == pytest.approx(expected, rel=1e-6)


def test_perfect_and_constant_answers() -> None:
    batch = make_batch(3)
    perfect = torch.nn.functional.one_hot(batch["targets"], CLASSES).transpose(2, 3).float()
    best = metric()
    best.update(**(batch | {"log_probs": perfect.log()}))
    assert numbers(best)["accuracy"] == 1
    constant = torch.full_like(batch["log_probs"], -9.0)
    for book in range(BOOKS):
        tokens = batch["targets"][..., book][batch["selected"]]
        constant[:, :, tokens.mode().values, book] = 0
    dumb = metric()
    dumb.update(**(batch | {"log_probs": constant}))
    assert numbers(dumb)["accuracy"] == pytest.approx(numbers(dumb)["constant_accuracy"])


def test_a_codebook_used_evenly_and_one_of_which_one_class_is_used() -> None:
    batch = make_batch(0, batch=CLASSES)
    batch["valid"] = torch.ones_like(batch["valid"])
    batch["targets"][..., 0] = torch.arange(CLASSES)[:, None]
    batch["targets"][..., 1] = 4
    found = metric()
    found.update(**batch)
    values = numbers(found)
    assert values["codebook_perplexity"] == pytest.approx((CLASSES + 1) / 2)
    assert values["codebook_usage"] == pytest.approx((1 + 1 / CLASSES) / 2)


def test_ranks_add_up() -> None:
    """What DDP does: every state is summed over the ranks."""
    batches = [make_batch(0), make_batch(1, share=0.0), make_batch(2, batch=1)]
    together, ranks = metric(), [metric() for _ in batches]
    for rank, batch in zip(ranks, batches, strict=True):
        rank.update(**batch)
        together.update(**batch)
    first = ranks[0]
    for rank in ranks[1:]:
        first.merge_state(rank)
    assert numbers(first) == numbers(together)


def test_one_book_may_have_no_axis() -> None:
    batch = make_batch(0)
    batch |= {"log_probs": batch["log_probs"][..., :1], "targets": batch["targets"][..., :1]}
    squeezed = batch | {"log_probs": batch["log_probs"].squeeze(-1), "targets": batch["targets"].squeeze(-1)}
    found = [MaskedPredictionMetrics(num_books=1, num_classes=CLASSES) for _ in range(2)]
    for one, given in zip(found, (batch, squeezed), strict=True):
        one.update(**given)
    assert numbers(found[0]) == numbers(found[1])


def test_targets_of_another_length_are_as_in_the_loss() -> None:
    batch = make_batch(0)
    short = batch | {"targets": batch["targets"][:, :-2]}
    batch["targets"][:, -2:] = 0
    found = [metric(), metric()]
    for one, given in zip(found, (batch, short), strict=True):
        one.update(**given)
    assert numbers(found[0]) == numbers(found[1])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_finite_when_nothing_was_selected() -> None:
    found = metric()
    assert all(math.isfinite(value) for value in numbers(found).values())
    for _ in range(2):
        found.update(**make_batch(0, share=0.0))
    values = numbers(found)
    assert all(math.isfinite(value) for value in values.values())
    assert values["accuracy"] == values["constant_accuracy"] == values["masked_share"] == 0
    assert values["empty_batches"] == 2


def test_a_shape_that_is_not_the_codebooks() -> None:
    with pytest.raises(ValueError, match="log_probs must end in 6 classes and 2 books"):
        metric().update(**(make_batch(0) | {"log_probs": torch.zeros(3, FRAMES, BOOKS, CLASSES)}))
