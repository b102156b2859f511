"""Numbers that a user typed: of the right kind and in range, or one line that names the key."""

import math
from typing import Any


def whole_number(name: str, value: Any, *, least: int) -> int:
    """The value as an int; 2e4 is one too. Raises ValueError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not float(value).is_integer() or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, *, least: float, most: float = math.inf) -> float:
    """The value as a float. Raises ValueError."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    if not kind or not least <= value <= most:
        limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")
    return float(value)
