"""Scale-invariant SDR and permutation-invariant training (PIT) for separated sources.

SI-SDR: Le Roux, Wisdom, Erdogan, Hershey, "SDR - half-baked or well done?", 2019, with eps where silence
would give 0 / 0, so that value and gradient are finite for any input. PIT: Kolbaek, Yu, Tan, Jensen,
"Multitalker Speech Separation with Utterance-Level Permutation Invariant Training of Deep Recurrent Neural
Networks", 2017.

Two conventions hold throughout. `pairwise[b, i, j]` compares estimate i with target j. `permutation[b, j]` is
the index of the *estimate* that is assigned to target j, so `reorder(estimates, permutation)` lines up with
the targets.
"""

from itertools import permutations

import torch
from torch import Tensor

EPS = 1e-8
# 3! = 6 sums are cheaper than one trip to the host for the Hungarian algorithm, 4! = 24 are not.
MAX_EXHAUSTIVE_SOURCES = 3


def si_sdr(estimate: Tensor, target: Tensor, *, zero_mean: bool = True, eps: float = EPS) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB; half precision is promoted to float32.

    With s = <e, t> t / (|t|^2 + eps): 10 log10(|s|^2 / (|e - s|^2 + eps) + eps). A silent target or a silent
    estimate gives 10 log10(eps), -80 dB for the default.

    Shape: (..., T), (..., T) -> (...).
    """
    dtype = torch.promote_types(torch.promote_types(estimate.dtype, target.dtype), torch.float32)
    estimate, target = _centred(estimate, target, dtype=dtype, zero_mean=zero_mean)
    dot = (estimate * target).sum(-1, keepdim=True)
    energy = target.square().sum(-1, keepdim=True)
    signal = dot / (energy + eps) * target  # (..., T)
    distortion = (estimate - signal).square().sum(-1)
    return 10 * torch.log10(signal.square().sum(-1) / (distortion + eps) + eps)


def pairwise_neg_si_sdr(estimates: Tensor, targets: Tensor, *, zero_mean: bool = True, eps: float = EPS) -> Tensor:
    """Negative SI-SDR in dB of every estimate with every target.

    Only inner products are needed: with a = <e, t> / (|t|^2 + eps) the distortion is
    |e|^2 - 2 a <e, t> + a^2 |t|^2. That difference cancels for good estimates (in float32 it is off by
    0.06 dB at 40 dB and by 7 dB at 60 dB), so the products are formed in float64, where it holds to 1e-4 dB
    at 100 dB. Autocast leaves float64 alone.

    Shape: (B, C, T), (B, C, T) -> (B, C, C), float64 for float64 inputs, else float32.
    """
    if estimates.ndim != 3 or estimates.shape != targets.shape:
        raise ValueError(
            "estimates and targets must have one shape (batch, sources, samples), "
            f"got {tuple(estimates.shape)} and {tuple(targets.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(estimates.dtype, targets.dtype), torch.float32)
    estimates, targets = _centred(estimates, targets, dtype=torch.float64, zero_mean=zero_mean)
    dot = estimates @ targets.mT  # (B, C, C)
    energy = targets.square().sum(-1).unsqueeze(1)  # (B, 1, C)
    scale = dot / (energy + eps)
    signal = scale.square() * energy
    distortion = estimates.square().sum(-1).unsqueeze(2) - 2 * scale * dot + signal
    # A perfect estimate leaves rounding errors of either sign.
    ratio = signal / (distortion.clamp_min(0) + eps)
    return (-10 * torch.log10(ratio + eps)).to(dtype)


def permutation_invariant_loss(pairwise: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of estimates to targets with the least mean loss.

    All assignments are tried up to 3 sources, above that the Hungarian algorithm finds it.

    Shape: (B, C, C) -> loss (B,), permutation (B, C) int64. The gradient flows through the chosen entries. A
    loss that is not a number comes out as such; its permutation means nothing.
    """
    num_sources = pairwise.shape[-1]
    if num_sources > MAX_EXHAUSTIVE_SOURCES:
        permutation = _hungarian(pairwise)
        return pairwise.gather(1, permutation.unsqueeze(1)).squeeze(1).mean(-1), permutation
    orders = list(permutations(range(num_sources)))
    means = [
        torch.stack([pairwise[:, i, j] for j, i in enumerate(order)], -1).mean(-1)  # (B,)
        for order in orders
    ]
    loss, best = torch.stack(means, -1).min(-1)  # (B, C!) -> (B,)
    # non_blocking: a GPU need not be waited for to receive these few numbers.
    table = torch.tensor(orders).to(pairwise.device, non_blocking=True)  # (C!, C)
    return loss, table[best]


def pit_neg_si_sdr(
    estimates: Tensor, targets: Tensor, *, zero_mean: bool = True, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Mean negative SI-SDR over the sources under the best permutation: the loss that separators train with.

    Shape: (B, C, T), (B, C, T) -> loss (B,) in dB, permutation (B, C) int64.
    """
    return permutation_invariant_loss(pairwise_neg_si_sdr(estimates, targets, zero_mean=zero_mean, eps=eps))


def reorder(estimates: Tensor, permutation: Tensor) -> Tensor:
    """Puts estimates in the order of the targets. Shape: (B, C, T), (B, C) -> (B, C, T)."""
    return torch.take_along_dim(estimates, permutation.unsqueeze(-1), dim=1)


def _centred(*signals: Tensor, dtype: torch.dtype, zero_mean: bool) -> list[Tensor]:
    promoted = [signal.to(dtype) for signal in signals]
    return [x - x.mean(-1, keepdim=True) for x in promoted] if zero_mean else promoted


def _hungarian(pairwise: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # a slow import that few need

    # Rows are targets. Values that are not finite would be refused; the loss still shows them.
    costs = pairwise.detach().mT.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).double().cpu().numpy()
    rows = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs]
    return torch.stack(rows).to(pairwise.device)
