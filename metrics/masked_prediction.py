"""How well hidden tokens are predicted, and how much there is to predict.

Beside the accuracy stand the best answer that does not look at the input, and how evenly the codebooks are used: one of
which a single class occurs is predicted at once, and nothing is learned by it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric


def with_books(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both with an axis for the books, which those of a single book may lack.

    Shape: (B, T, C[, N]), (B, T'[, N]) -> (B, T, C, N), (B, T', N).
    """
    return (log_probs.unsqueeze(-1), targets.unsqueeze(-1)) if log_probs.ndim == 3 else (log_probs, targets)


def right_tokens(log_probs: Tensor, targets: Tensor, selected: Tensor) -> Tensor:
    """Which of the selected tokens are the most likely ones. Targets that end earlier go on with class 0.

    Shape: log_probs (B, T, C, N), targets (B, T', N), selected (B, T) bool -> (B, T, N) bool.
    """
    targets = pad(targets, (0, 0, 0, selected.shape[1] - targets.shape[1]))  # (B, T, N)
    return (log_probs.detach().argmax(2) == targets) & selected.unsqueeze(-1)


class MaskedPredictionMetrics(Metric):
    """Shares and perplexities over all tokens of all batches and processes.

    `compute()` returns float32 scalars, all finite, also where nothing was selected:
    * `accuracy`: share of the selected tokens, all books alike, that are the most likely class;
    * `constant_accuracy`: the same of the best constant answer, each book's most frequent token among the selected;
    * `perplexity`: exp of the mean loss of the selected; C for uniform guesses;
    * `codebook_usage`: share of classes that occur among the valid tokens, mean over the books;
    * `codebook_perplexity`: exp of the entropy of the valid tokens' frequencies, mean over the books;
    * `masked_share`: selected of the valid tokens;
    * `empty_batches`: number of batches without a selected token.

    *num_books* (N), *num_classes* (C) of a book.
    """

    full_state_update = False

    correct: Tensor
    selected_tokens: Tensor
    valid_tokens: Tensor
    nll_sum: Tensor
    empty_batches: Tensor

    def __init__(self, *, num_books: int, num_classes: int) -> None:
        super().__init__()
        self.num_books, self.num_classes = num_books, num_classes
        # Sums, so that ranks add up to exactly one process's result. A token's row is its book, its column its class.
        histogram = (num_books, num_classes)
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("selected_tokens", torch.zeros(histogram, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid_tokens", torch.zeros(histogram, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("empty_batches", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, *, log_probs: Tensor, targets: Tensor, selected: Tensor, valid: Tensor, nll_sum: Tensor) -> None:
        """Adds a batch.

        *selected*: tokens whose frames are masked. *valid*: those that are not padding. *nll_sum*: as
        losses/masked_prediction.py has it. Targets may end earlier or later, as there.

        Shape: log_probs (B, T, C[, N]), targets (B, T'[, N]), selected, valid (B, T) bool, nll_sum ().
        """
        log_probs, targets = with_books(log_probs, targets)
        if log_probs.shape[2:] != (self.num_classes, self.num_books):
            raise ValueError(
                f"log_probs must end in {self.num_classes} classes and {self.num_books} books, "
                f"got {tuple(log_probs.shape)}"
            )
        targets = pad(targets, (0, 0, 0, selected.shape[1] - targets.shape[1]))  # (B, T, N)
        self.correct += right_tokens(log_probs, targets, selected).sum()
        self.selected_tokens += self._histogram(targets, selected)
        self.valid_tokens += self._histogram(targets, valid)
        self.nll_sum += nll_sum.detach()
        self.empty_batches += ~selected.any()

    def compute(self) -> dict[str, Tensor]:
        num_selected = self.selected_tokens.sum()
        num_valid = self.valid_tokens.sum()
        frequency = self.valid_tokens / self.valid_tokens.sum(1, keepdim=True).clamp_min(1).double()  # (N, C)
        entropy = -torch.xlogy(frequency, frequency).sum(1)
        values = {
            "accuracy": self.correct / num_selected.clamp_min(1),
            "constant_accuracy": self.selected_tokens.amax(1).sum() / num_selected.clamp_min(1),
            "perplexity": (self.nll_sum / (num_selected / self.num_books).clamp_min(1)).exp(),
            "codebook_usage": (self.valid_tokens > 0).double().mean(),
            "codebook_perplexity": entropy.exp().mean(),
            "masked_share": num_selected / num_valid.clamp_min(1),
            "empty_batches": self.empty_batches,
        }
        return {name: value.float() for name, value in values.items()}

    def _histogram(self, targets: Tensor, chosen: Tensor) -> Tensor:
        """How often each class of each book occurs where *chosen* says so: (B, T, N), (B, T) -> (N, C)."""
        # Not bincount, for which the host waits for the device.
        book = torch.arange(self.num_books, device=targets.device)
        cell = (book * self.num_classes + targets).flatten()  # (B T N,)
        weight = chosen.unsqueeze(-1).expand_as(targets).flatten().long()
        counts = torch.zeros(self.num_books * self.num_classes, dtype=torch.int64, device=targets.device)
        return counts.scatter_add_(0, cell, weight).view(self.num_books, self.num_classes)
