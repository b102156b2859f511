"""DBC-DAC: a stack of gradients becomes a stack of low rank ("dimension balance", then "residual compensation").

    X = A / d          d_i = max(‖a_i‖, threshold max_j ‖a_j‖)^balance, the rows' balance; d = 1 without it
    P = d X_k          X_k: a low-rank approximation of X (modules/range_finder.py)
    residual A - P     none: left out; damp: a share of it is kept; ef: carried to the next step (error feedback,
                       Karimireddy et al., 2019, arXiv 1901.09847), so that nothing is ever lost

All of it is homogeneous of degree 1, exactly so for powers of 2: gradients may still bear a loss scale. A matrix that
is not finite, or whose norm's square is not, comes back as it was, for whoever looks for it (a GradScaler), and
disturbs no other one of its stack.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modules import gradient_compression_guide as guide
from modules.range_finder import Approximation, exact, randomised, warm

METHODS = ("svd", "rsvd", "warm", "guide")
RESIDUALS = ("none", "damp", "ef")


class Compressed(NamedTuple):
    """What `compress` makes of a stack (B, M, N). Numbers are NaN for a matrix that came back as it was."""

    gradient: Tensor
    """(B, M, N), in the type of the input."""
    captured: Tensor
    """(B,): ‖X_k‖² / ‖X‖²; 1 for a matrix of zeros."""
    relative_error: Tensor
    """(B,): ‖A - P‖_F / ‖A‖_F, before the residual is compensated; 0 for a matrix of zeros."""
    norm: Tensor
    """(B,): ‖A‖_F, with the error that was carried here."""
    capped: Tensor
    """(B,): the rank's limit captured less than the energy that was asked for."""
    error: Tensor | None
    """(B, M, N): what is carried to the next step; None unless the residual is `ef`."""
    basis: Tensor | None
    """(B, min(M, N), rank): where `warm` starts next time; None for other methods."""


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    """The rank's limit: that share of the shorter side, at least 1."""
    return max(1, round(min(shape) * ratio))


def compress(
    gradients: Tensor,
    *,
    rank: int,
    generator: torch.Generator,
    method: str = "warm",
    energy: float | None = None,
    balance: float = 0.0,
    threshold: float = 1e-3,
    residual: str = "damp",
    damp: float = 0.1,
    error: Tensor | None = None,
    basis: Tensor | None = None,
) -> Compressed:
    """Compress a stack of gradients of one shape.

    Args:
        gradients: (B, M, N), of any floating type; computed in float32, in float64 where it is given.
        rank: the limit, below min(M, N).
        generator: of the random sketches, on the gradients' device.
        method: `svd` is exact; `rsvd` draws a random sketch each time; `warm` starts from *basis*, and as `rsvd` where
            there is none; `guide` is the original, see modules/gradient_compression_guide.py, for comparison only.
        energy: share of ‖X‖² after which smaller directions are left out; None: the rank is the limit.
        balance: exponent of the rows' balance; 0: none. What is least then is the error of X, no longer that of A.
        threshold: floor of a row's norm, relative to the largest row's.
        residual, damp: see above; *damp* is the share that is kept.
        error, basis: what the last call returned for these matrices, or None.

    Raises ValueError for a method or residual of another name.
    """
    if method not in METHODS:
        raise ValueError(f"method={method}: choose one of {', '.join(METHODS)}")
    if residual not in RESIDUALS:
        raise ValueError(f"residual={residual}: choose one of {', '.join(RESIDUALS)}")
    a = gradients if gradients.dtype == torch.float64 else gradients.float()
    if error is not None:
        a = a + error
    kept = damp if residual == "damp" else 0.0
    next_basis = None
    if method == "guide":
        finite = a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        x = torch.where(finite, a, 0.0)
        result = guide.stabilise(x, rank, generator=generator, energy=energy, compensate=residual != "none")
        total, squared_error = _squared(a), _squared(a - result)
        ok, capped = squared_error.isfinite(), torch.zeros_like(total, dtype=torch.bool)
        captured = 1 - squared_error / total  # no projection, so it may be below 0
    else:
        d = row_norms(a, threshold) ** balance if balance else None
        x = a if d is None else a / d
        found = _approximate(x, rank, method, energy, basis, generator)
        left = found.left if d is None else found.left * d
        result = torch.baddbmm(a, left, found.right, beta=kept, alpha=1 - kept)
        ok, capped, captured = found.sound, found.capped, found.captured / found.total
        total, squared_error = found.total, found.total - found.captured
        if d is not None:
            total, squared_error = _squared(a), _squared(torch.baddbmm(a, left, found.right, alpha=-1))
        if method == "warm":
            next_basis = torch.where(ok[:, None, None], found.basis, 0.0)  # zeros are drawn anew

    result = _where(ok, result.to(gradients.dtype), gradients)
    carried = None
    if residual == "ef":
        # Less what is applied, so that its rounding to a shorter type is carried too.
        carried = _where(ok, a - result, torch.zeros_like(a) if error is None else error.to(a))
    # Nothing is captured of nothing: 0 / 0.
    captured = torch.where(total > 0, captured, 1.0)
    relative_error = torch.where(total > 0, squared_error.clamp(min=0) / total, 0.0).sqrt()
    captured, relative_error, norm = (
        torch.where(ok, value, torch.nan) for value in (captured, relative_error, total.sqrt())
    )
    return Compressed(result, captured, relative_error, norm, capped & ok, carried, next_basis)


def row_norms(a: Tensor, threshold: float) -> Tensor:
    """Norms of the rows, at least *threshold* times the largest one of their matrix; ones for a matrix of zeros.

    Shape: (..., M, N) -> (..., M, 1).
    """
    norms = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    largest = norms.amax(-2, keepdim=True)
    return torch.where(largest > 0, torch.maximum(norms, threshold * largest), 1.0)


def _approximate(
    x: Tensor, rank: int, method: str, energy: float | None, basis: Tensor | None, generator: torch.Generator
) -> Approximation:
    if method == "svd":
        return exact(x, rank, energy=energy)
    if method == "warm" and basis is not None:
        return warm(x, basis, generator=generator, energy=energy)
    return randomised(x, rank, generator=generator, energy=energy)


def _where(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """*new* for the matrices that are *ok*, *old* for the others."""
    if not ok.is_cuda and bool(ok.all()):  # saves a pass where looking costs nothing
        return new
    return torch.where(ok[:, None, None], new, old)


def _squared(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=(-2, -1)).square()
