"""Low-rank approximations of stacks of matrices: exact, randomised, and warm-started from the last one.

Halko, Martinsson & Tropp, "Finding structure with randomness", 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1; the warm
start is the power iteration of Vogels et al., "PowerSGD", 2019 (arXiv 1905.13727).

All find an orthonormal Q whose range holds most of A, and return A_k = Q_k (Q_kᵀ A). Then

    ‖A - A_k‖² = ‖A‖² - ‖Q_kᵀ A‖²        (Frobenius norms; A_k is an orthogonal projection of A)

is an exact certificate, and no formula divides by a singular value. float64 stays float64, all else is computed in
float32. A matrix that is not finite, or whose norm's square is not, is not `sound`, the others of its stack are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns of a sketch beyond the rank; Halko et al. find 5 to 10 enough."""
_LONG = 16  # A Gram matrix pays from this ratio of the sides; at 5000 x 256 it is as fast as a sketch, and exact.


class Approximation(NamedTuple):
    """A_k = left @ right for each matrix of a stack.

    Shapes: *left* (..., M, K), *right* (..., K, N), *basis* (..., min(M, N), K), all others (...).
    """

    left: Tensor
    right: Tensor
    captured: Tensor
    """‖A_k‖²_F."""
    total: Tensor
    """‖A‖²_F."""
    capped: Tensor
    """Whether the rank's limit captured less than the share that was asked for."""
    basis: Tensor
    """The factor of the shorter side, from which `warm` starts next time."""
    sound: Tensor
    """Whether the numbers are finite and Q is orthonormal; otherwise all of the above mean nothing."""

    def error(self) -> Tensor:
        """‖A - A_k‖_F, from the certificate."""
        return (self.total - self.captured).clamp(min=0).sqrt()


def exact(a: Tensor, rank: int, *, energy: float | None = None) -> Approximation:
    """The best approximation, from a full singular value decomposition. Arguments as `randomised`."""
    x, wide = _tall(a)
    u, s, v = torch.linalg.svd(_finite(x), full_matrices=False)
    k = min(rank, s.shape[-1])
    return _finish(x, u[..., :k], s[..., :k, None] * v[..., :k, :], energy, wide)


def randomised(
    a: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    power_iterations: int = 1,
    energy: float | None = None,
) -> Approximation:
    """A nearly best approximation: at most 1.05 times its error with one power iteration.

    Where one side is short the Gram matrix of that side gives the best one for less.

    Args:
        rank: its limit; at least 1.
        generator: of the random sketch, on the device of *a*; all matrices of a stack share one sketch. The global
            one is never drawn from.
        power_iterations: each sharpens the sketch by two passes over A.
        energy: share of ‖A‖²_F after which smaller directions are left out; None: the rank's limit is the rank.

    Shape: (..., M, N).
    """
    x, wide = _tall(a)
    m, n = x.shape[-2:]
    width = min(rank + OVERSAMPLING, n)
    if n <= 2 * width or m >= _LONG * n:
        v = _eigenvectors(x.mT @ x)[..., : min(rank, n)]
        return _finish(x, x @ v, v.mT, energy, wide)
    y = x @ _gaussian(x, width, generator)
    for _ in range(power_iterations):
        y, _ = orthonormal(y)
        z, _ = orthonormal(x.mT @ y)
        y = x @ z
    q, sound = orthonormal(y)
    b = q.mT @ x  # (..., width, n)
    left, right = _by_energy(q, b)
    k = min(rank, n)
    return _finish(x, left[..., :k], right[..., :k, :], energy, wide, sound)


def warm(a: Tensor, basis: Tensor, *, generator: torch.Generator, energy: float | None = None) -> Approximation:
    """One pass from the `basis` of an earlier approximation, whose width is the rank's limit.

    1.01 to 1.1 times the least error where A changed by a third. A column of zeros, from which no pass would ever
    come away, is drawn anew. Other arguments as `randomised`.

    Shape: (..., M, N), basis (..., min(M, N), K).
    """
    x, wide = _tall(a)
    dead = (basis == 0).all(-2, keepdim=True)
    start = torch.where(dead, _gaussian(x, basis.shape[-1], generator), basis.to(x))
    q, sound = orthonormal(x @ start)  # (..., m, K)
    b = q.mT @ x
    if energy is not None:
        q, b = _by_energy(q, b)
    return _finish(x, q, b, energy, wide, sound)


def orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the columns of *y*, and for which matrices it is one.

    Householder's on a CPU. On a GPU, where that works through a stack one matrix after another, `cholesky_qr`.

    Shape: (..., M, K), M >= K -> (..., M, K), (...).
    """
    if y.is_cuda:
        return cholesky_qr(y)
    q = torch.linalg.qr(y).Q
    return q, torch.ones_like(q[..., 0, 0], dtype=torch.bool)


def cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Cholesky factors of YᵀY, in matrix products and without the host looking at a number.

    Shifted CholeskyQR3 (Fukaya et al., 2020, arXiv 1809.11085) with columns brought to length 1 before each pass, so
    that ranks below K come out too: columns without direction get one from rounding, columns of zeros stay zeros.
    """
    k, eps = y.shape[-1], torch.finfo(y.dtype).eps
    eye = torch.eye(k, dtype=y.dtype, device=y.device)
    for shift in (10 * k * eps, k * eps, 0.0):
        lengths = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
        present = lengths > 0
        y = y / torch.where(present, lengths, 1.0)
        # A one in the place of a zero column's length, or there would be no factor.
        gram = y.mT @ y + shift * eye + torch.diag_embed(~present.squeeze(-2)).to(y.dtype)
        factor, _ = torch.linalg.cholesky_ex(gram, upper=True)
        y = torch.linalg.solve_triangular(factor, y, upper=True, left=False)
    defect = (y.mT @ y - torch.diag_embed(present.squeeze(-2)).to(y.dtype)).abs().amax((-2, -1))
    return y, defect < 200 * eps  # false for NaN too


def _by_energy(q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Q B = (Q U) (Uᵀ B) with rows of Uᵀ B that are orthogonal, the longest first: B Bᵀ = U Λ Uᵀ."""
    u = _eigenvectors(b @ b.mT)
    return q @ u, u.mT @ b


def _eigenvectors(gram: Tensor) -> Tensor:
    """In columns, that of the largest eigenvalue first. Shape: (..., K, K) -> (..., K, K)."""
    return torch.linalg.eigh(_finite(gram)).eigenvectors.flip(-1)


def _finite(a: Tensor) -> Tensor:
    """Zeros for matrices with a number that is not finite: LAPACK refuses the whole stack."""
    return torch.where(a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), a, 0.0)


def _finish(
    x: Tensor, left: Tensor, right: Tensor, energy: float | None, wide: bool, sound: Tensor | None = None
) -> Approximation:
    """One of the factors is orthonormal, so the other one's columns or rows hold the energy."""
    total = torch.linalg.vector_norm(x, dim=(-2, -1)).square()
    valid: Tensor = total.isfinite()
    if sound is not None:
        valid = valid & sound
    # Of the longer factor; the orthonormal one has columns of length 1 (or 0).
    parts = left.square().sum(-2) * right.square().sum(-1)  # (..., K)
    basis = right.mT
    capped = torch.zeros_like(valid)
    if energy is not None:
        before = parts.cumsum(-1) - parts
        parts = parts * (before < energy * total[..., None])
        right = right * (parts > 0)[..., None]
        capped = parts.sum(-1) < energy * total
    left, right = (right.mT, left.mT) if wide else (left, right)
    return Approximation(left, right, parts.sum(-1), total, capped, basis, valid)


def _tall(a: Tensor) -> tuple[Tensor, bool]:
    """With at least as many rows as columns, in a precision that is computed in, and whether it was transposed."""
    a = a if a.dtype == torch.float64 else a.float()
    wide = a.shape[-2] < a.shape[-1]
    return (a.mT if wide else a), wide


def _gaussian(x: Tensor, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape[-1], width, generator=generator, dtype=x.dtype, device=x.device)
