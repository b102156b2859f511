"""Random numbers that are a function of a seed and a position, not of what was drawn before.

Every item of a batch brings a seed, so its numbers do not depend on its neighbours, its padding, the worker, the rank
or the device; a resumed run draws what the interrupted one would have drawn.

The generator is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the
number at a position is a hash of seed, stream and position. Integer arithmetic modulo 2**64 only, so the bits are the
same on every device.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64-bit pattern of *value* as torch's int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63


INCREMENT = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's fills up with the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ _shift_right(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def uniform(seeds: Tensor, num: int, *, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24. Row i depends on seeds[i], *num* only says where it ends.

    Arguments
        seeds: int64, one per row.
        num: numbers per row.
        stream: rows of the same seed in different streams are independent.

    Shape: (B,) -> (B, num) float32.

    Raises ValueError for seeds of another shape or type.
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 of shape (batch,), got {seeds.dtype} of {tuple(seeds.shape)}")
    key = _mix(_mix(seeds + INCREMENT) + _signed((stream + 1) * INCREMENT))
    positions = torch.arange(1, num + 1, device=seeds.device)
    bits = _mix(key[:, None] + positions * INCREMENT)  # (B, num)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24
