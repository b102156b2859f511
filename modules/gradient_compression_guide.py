"""The original formulas of DBC-DAC as they were written, faults included: to compare with, not to train with.

A matrix is divided by its signed row sums, projected, and multiplied again. What is wrong with it:

* the singular values are counted twice (Y V bears them already), so that f(c A) = c² f(A);
* the projection is onto random directions, orthonormalised before they have seen A: it holds rank / N of the energy;
* row sums cancel; behind a layer norm all are zero, and the floor of 1e-6 makes of them what it will;
* "95 % of the energy" is that of the sketch, not of A;
* `launder` hides an overflow from whoever scales the loss.
"""

import math

import torch
from torch import Tensor


def stabilise(
    a: Tensor, rank: int, *, generator: torch.Generator, energy: float | None = None, compensate: bool = False
) -> Tensor:
    """Balance, projection (`first`, with an *energy* `second`) and, to *compensate*, one iteration of the residual.

    Shape: (B, M, N) -> (B, M, N).
    """

    def project(w: Tensor, limit: int) -> Tensor:
        one = first if energy is None else second
        options = {} if energy is None else {"energy": energy}
        return torch.stack([one(matrix, limit, generator=generator, **options) for matrix in w])

    d = row_sums(a)
    w = a / d
    found = project(w, rank)
    if compensate:
        found = found + 0.1 * project(w - found, max(1, int(0.05 * min(w.shape[-2:]))))
    return d * found


def row_sums(a: Tensor, threshold: float = 1e-6) -> Tensor:
    """Signed sums; those within the threshold become the threshold, with their sign.

    Shape: (..., M, N) -> (..., M, 1).
    """
    sums = a.sum(-1, keepdim=True)
    floor = torch.where(sums < 0, -threshold, threshold).to(sums)
    return torch.where(sums.abs() > threshold, sums, floor)


def first(a: Tensor, rank: int, *, generator: torch.Generator) -> Tensor:
    """The "first optimisation": a random projection and an eigen-decomposition. Shape: (M, N) -> (M, N)."""
    x = a if a.shape[0] >= a.shape[1] else a.mT
    q = torch.linalg.qr(_gaussian(x.shape[1], rank, x, generator)).Q
    y = x @ q
    eigenvalues, vectors = torch.linalg.eigh(y.mT @ y)
    result = (y @ vectors) * eigenvalues.clamp(min=0).sqrt() @ (q @ vectors).mT
    return result if x is a else result.mT


def second(a: Tensor, rank: int, *, generator: torch.Generator, energy: float = 0.95) -> Tensor:
    """The "second optimisation": a sparse projection, power iterations, a rank by energy. Shape: (M, N) -> (M, N)."""
    x = a if a.shape[0] >= a.shape[1] else a.mT
    density = min(0.1, 1 / math.sqrt(rank))
    q = _gaussian(x.shape[1], rank, x, generator) / math.sqrt(density)
    q = q * (torch.rand(q.shape, generator=generator, dtype=x.dtype, device=x.device) > 1 - density)
    q = torch.linalg.qr(q).Q
    y = x @ q
    gram = y.mT @ y
    if rank <= 50:
        k = max(1, int(0.8 * rank))
        vectors = torch.linalg.qr(_gaussian(rank, k, x, generator)).Q
        for _ in range(20):
            following = torch.linalg.qr(gram @ vectors).Q
            settled = torch.allclose(vectors, following, atol=1e-5)
            vectors = following
            if settled:
                break
        eigenvalues = (vectors.mT @ gram @ vectors).diagonal()
    else:
        eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues, order = eigenvalues.sort(descending=True)
    shares = eigenvalues.cumsum(0)
    k = min(int((shares < energy * shares[-1]).sum()) + 1, len(order))
    eigenvalues, vectors = eigenvalues[:k], vectors[:, order[:k]]
    result = (y @ vectors) * eigenvalues.clamp(min=0).sqrt() @ (q @ vectors).mT
    return result if x is a else result.mT


def launder(gradient: Tensor) -> Tensor:
    """What the original did to every gradient first. `compress` never does."""
    return gradient.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)


def _gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)
