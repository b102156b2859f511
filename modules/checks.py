"""Arguments of a module: of the right kind, or a ValueError that begins with the argument's name."""

from collections.abc import Collection
from typing import Any


def whole_numbers(**sizes: Any) -> None:
    """Raises ValueError for the first that is no whole number of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def numbers(*, least: float, most: float, **values: Any) -> None:
    """Raises ValueError for the first that is no number in range."""
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            limits = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
            raise ValueError(f"{name} must be a number {limits}, got {value!r}")


def switches(**flags: Any) -> None:
    """Raises ValueError for the first that is neither true nor false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


def choices(**chosen: tuple[Any, Collection[str]]) -> None:
    """Each a value and what it may be. Raises ValueError for the first that is something else."""
    for name, (value, known) in chosen.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
