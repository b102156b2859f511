"""Ranges that a user typed as [low, high]: in order and within limits, or one line that names the key."""

import math
from collections.abc import Sequence
from typing import Any

Range = Sequence[float]
"""[low, high]; drawn from uniformly, both ends included."""


def check_range(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    """The range as two floats. Raises ValueError."""
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else ()
    good = [isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in pair]
    if not pair or not all(good) or not least <= pair[0] <= pair[1] <= most:
        limits = f", from {least:g} to {most:g}" if most < math.inf else f", {least:g} or more"
        raise ValueError(f"{name} must be [low, high]{limits if least > -math.inf else ''}, got {value!r}")
    return float(pair[0]), float(pair[1])
