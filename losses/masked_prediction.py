"""The loss of masked prediction: how unlikely the tokens of the hidden frames were.

As NeMo 3.0.0's `MLMLoss` and `MultiMLMLoss`, but as a sum and a count: the mean over a step's masked frames can only be
taken once those of all processes and micro-batches are known (models/global_loss.py).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def selected_frames(mask: Tensor, *, combine_time_steps: int, mask_threshold: float) -> Tensor:
    """Which tokens count: those of whose frames more than the share *mask_threshold* is masked.

    *combine_time_steps*: frames per token, K. With 8 and a threshold of 0.8, at least 7 of the 8.

    Raises ValueError where the frames are no whole number of tokens.

    Shape: (B, T) bool -> (B, T / K) bool.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape (batch, frames), got {tuple(mask.shape)}")
    if mask.shape[1] % combine_time_steps:
        raise ValueError(f"combine_time_steps={combine_time_steps} does not divide a batch's {mask.shape[1]} frames")
    masked = mask.unflatten(1, (-1, combine_time_steps)).sum(-1)  # (B, T / K)
    # In float32, where 4 / 5 is not more than 0.8, and by a division, which all devices round alike.
    return masked.float() / combine_time_steps > mask_threshold


def masked_nll(log_probs: Tensor, targets: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the selected tokens, the mean over the books, summed; and how many they are.

    Targets that end before *selected* go on with class 0, longer ones are cut. Without a selected token the sum is 0,
    and so is its gradient. In float32 at least.

    Raises ValueError where shapes do not fit.

    Shape: log_probs (B, T, C[, N]), targets (B, T'[, N]), selected (B, T) bool -> (), () int64.
    """
    if log_probs.ndim not in (3, 4) or targets.ndim != log_probs.ndim - 1 or selected.shape != log_probs.shape[:2]:
        raise ValueError(
            "log_probs must have shape (batch, frames, classes) and targets and selected (batch, frames), the first "
            f"two perhaps with books behind, got {tuple(log_probs.shape)}, {tuple(targets.shape)} and "
            f"{tuple(selected.shape)}"
        )
    if log_probs.ndim == 3:
        log_probs, targets = log_probs.unsqueeze(-1), targets.unsqueeze(-1)
    targets = pad(targets, (0, 0, 0, selected.shape[1] - targets.shape[1]))  # (B, T, N)
    # Every position is looked up: to pick the selected ones, the host would have to wait for their number.
    nll = -log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)  # (B, T, N)
    nll = nll.to(torch.promote_types(nll.dtype, torch.float32)).mean(-1)
    return nll.masked_fill(~selected, 0.0).sum(), selected.sum()
