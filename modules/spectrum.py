"""Singular values of a weight, flattened behind its first axis, and what they say: how low a rank it nearly has.

They are computed exactly, in float64 on the CPU: the same on every device.
"""

import math

import torch
from torch import Tensor


def in_float64(values: Tensor) -> Tensor:
    """Without gradient, on the CPU: not every device has float64."""
    return values.detach().cpu().double()


def singular_values_of(weight: Tensor) -> Tensor:
    """Of a weight flattened behind its first axis, falling, in float64 on the CPU: (K,)."""
    return torch.linalg.svdvals(in_float64(weight).flatten(1))


def singular_values_of_factors(u: Tensor, v: Tensor) -> Tensor:
    """Those of u @ v that are not zero by its shape, falling, in float64 on the CPU. Shape: (M, r), (r, N) -> (r,)."""
    r_u, r_v = (torch.linalg.qr(in_float64(part)).R for part in (u, v.mT))
    return torch.linalg.svdvals(r_u @ r_v.mT)


def stable_rank(singular_values: Tensor) -> float:
    """‖W‖²_F / σ_1², at most the rank; 0 for a weight of zeros. Shape: (K,), falling."""
    largest = float(singular_values[0]) ** 2
    return float(singular_values.square().sum()) / largest if largest > 0 else 0.0


def captured_energy(singular_values: Tensor, rank: int) -> float:
    """The share of ‖W‖²_F in the first *rank* singular values; 1 for a weight of zeros."""
    total = float(singular_values.square().sum())
    return float(singular_values[:rank].square().sum()) / total if total > 0 else 1.0


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The least rank that captures that share of ‖W‖²_F, at least 1."""
    shares = singular_values.square().cumsum(0)
    if not shares[-1] > 0:
        return 1
    return min(int((shares < energy * shares[-1]).sum()) + 1, len(singular_values))


def rank_of_noise(rows: int, columns: int, energy: float) -> float:
    """The rank that captures that share of the ‖·‖²_F of a large matrix of independent numbers of one variance.

    By Marchenko and Pastur's law (1967) the squares of the singular values, over the larger side and the variance, lie
    at 1 + b + 2 √b cos θ, b the smaller side over the larger. There are 2/π sin² θ / (1 + b + 2 √b cos θ) dθ of them
    (share of the rank), which hold 2/π sin² θ dθ of the energy.
    """
    full, b = min(rows, columns), min(rows, columns) / max(rows, columns)
    step = math.pi / 1000
    theta = torch.arange(step / 2, math.pi, step, dtype=torch.float64)  # the largest singular values first
    energies = 2 / math.pi * theta.sin().square() * step
    counts = energies / (1 + b + 2 * math.sqrt(b) * theta.cos())
    return full * float(counts[energies.cumsum(0) < energy].sum())
