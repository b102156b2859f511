"""The loss of masked prediction: against a loop, where gradients go, and what must not change it."""

import math

import pytest
import torch
from torch import Tensor

from losses.masked_prediction import masked_nll, selected_frames

BATCH, FRAMES, CLASSES, BOOKS = 3, 7, 5, 2


def example(seed: int = 0, *, books: int = BOOKS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(BATCH, FRAMES, CLASSES, books, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (BATCH, FRAMES, books), generator=generator)
    selected = torch.rand(BATCH, FRAMES, generator=generator) < 0.5
    return scores, targets, selected


def test_more_than_the_share_of_a_tokens_frames() -> None:
    mask = torch.zeros(4, 16, dtype=torch.bool)
    for row, masked in enumerate((6, 7, 8)):
        mask[row, :masked] = True
    selected = selected_frames(mask, combine_time_steps=8, mask_threshold=0.8)
    assert selected.tolist() == [[False, False], [True, False], [True, False], [False, False]]
    assert torch.equal(selected_frames(mask, combine_time_steps=1, mask_threshold=0.8), mask)
    assert not selected_frames(mask[:, :10], combine_time_steps=10, mask_threshold=0.8)[2], "8 of 10 are not more"
    with pytest.raises(ValueError, match="combine_time_steps=8 does not divide a batch's 15 frames"):
        selected_frames(mask[:, :15], combine_time_steps=8, mask_threshold=0.8)


def test_the_share_is_that_of_the_masked_features() -> None:
    """As NeMo takes it: the mean over the features and frames of a token."""
    mask = torch.rand(5, 160, generator=torch.Generator().manual_seed(0)) < 0.8
    for steps in (1, 2, 4, 5, 8, 10):
        features = mask[:, None].expand(-1, 80, -1).float()  # (B, F, T)
        share = features.transpose(1, 2).reshape(5, 160 // steps, -1).mean(-1)
        found = selected_frames(mask, combine_time_steps=steps, mask_threshold=0.8)
        assert torch.equal(found, share > 0.8)


@pytest.mark.parametrize("books", [1, 3])
def test_sum_and_count_by_a_loop(books: int) -> None:
    scores, targets, selected = example(books=books)
    log_probs = scores.log_softmax(2)
    expected, positions = 0.0, 0
    for b in range(BATCH):
        for t in range(FRAMES):
            if selected[b, t]:
                positions += 1
                expected -= sum(log_probs[b, t, targets[b, t, n], n].item() for n in range(books)) / books
    nll_sum, count = masked_nll(log_probs, targets, selected)
    assert nll_sum.item() == pytest.approx(expected, rel=1e-12) and count.item() == positions > 3
    if books == 1:
        squeezed = masked_nll(log_probs.squeeze(-1), targets.squeeze(-1), selected)
        assert torch.equal(squeezed[0], nll_sum) and torch.equal(squeezed[1], count)


def test_uniform_answers_cost_the_logarithm_of_the_classes() -> None:
    uniform = torch.zeros(BATCH, FRAMES, CLASSES, BOOKS).log_softmax(2)
    nll_sum, count = masked_nll(uniform, *example()[1:])
    assert float(nll_sum / count) == pytest.approx(math.log(CLASSES), rel=1e-6)


def test_only_selected_positions_have_a_gradient() -> None:
    scores, targets, selected = example()
    scores.requires_grad_()
    masked_nll(scores.log_softmax(2), targets, selected)[0].backward()
    assert scores.grad is not None
    learning = scores.grad.abs().amax((2, 3)) > 0  # (B, T)
    assert torch.equal(learning, selected)
    # Softmax minus the target, shared among the books.
    probabilities = scores.detach().softmax(2)
    expected = (probabilities - torch.nn.functional.one_hot(targets, CLASSES).transpose(2, 3)) / BOOKS
    torch.testing.assert_close(scores.grad, expected * selected[..., None, None])


def test_padding_changes_nothing() -> None:
    scores, targets, selected = example()
    more = 4
    wider = [
        torch.cat([scores, torch.full((BATCH, more, CLASSES, BOOKS), 1e4, dtype=scores.dtype)], 1).log_softmax(2),
        torch.cat([targets, torch.ones(BATCH, more, BOOKS, dtype=torch.long)], 1),
        torch.cat([selected, torch.zeros(BATCH, more, dtype=torch.bool)], 1),
    ]
    for found, expected in zip(masked_nll(*wider), masked_nll(scores.log_softmax(2), targets, selected), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_targets_of_another_length() -> None:
    """NeMo goes on with class 0, and cuts what is too long."""
    scores, targets, _ = example()
    log_probs, everything = scores.log_softmax(2), torch.ones(BATCH, FRAMES, dtype=torch.bool)
    padded = torch.cat([targets[:, :-2], torch.zeros(BATCH, 2, BOOKS, dtype=torch.long)], 1)
    assert masked_nll(log_probs, targets[:, :-2], everything) == masked_nll(log_probs, padded, everything)
    longer = torch.cat([targets, targets], 1)
    assert masked_nll(log_probs, longer, everything) == masked_nll(log_probs, targets, everything)


def test_nothing_selected_is_zero_with_zero_gradient() -> None:
    scores, targets, selected = example()
    scores.requires_grad_()
    nll_sum, count = masked_nll(scores.log_softmax(2), targets, torch.zeros_like(selected))
    nll_sum.backward()
    assert nll_sum.item() == 0 and count.item() == 0
    assert scores.grad is not None and not scores.grad.any()


def test_half_precision_is_summed_in_float32() -> None:
    log_probs = torch.full((1, 3000, 2, 1), -1.0, dtype=torch.bfloat16)
    selected = torch.ones(1, 3000, dtype=torch.bool)
    nll_sum, _ = masked_nll(log_probs, torch.zeros(1, 3000, 1, dtype=torch.long), selected)
    assert nll_sum.dtype is torch.float32 and nll_sum.item() == 3000
    assert masked_nll(example()[0], *example()[1:])[0].dtype is torch.float64


def test_shapes_that_do_not_fit() -> None:
    scores, targets, selected = example()
    for wrong in (
        (scores, targets[..., 0], selected),
        (scores[..., 0], targets, selected),
        (scores, targets, selected.T),
    ):
        with pytest.raises(ValueError, match="log_probs must have shape"):
            masked_nll(*wrong)
    with pytest.raises(ValueError, match="mask must have shape"):
        selected_frames(selected[None], combine_time_steps=1, mask_threshold=0.5)
