"""Settings that change while training goes on: a value, or a mapping from the first epoch of each value.

segment: 4                    always
segment: {0: 1, 10: 4}        1 in epochs 0 to 9, 4 from epoch 10 on
"""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value", int, float)


def at_epoch(setting: Value | Mapping[int, Value], epoch: int) -> Value:
    """The value of a setting in an epoch."""
    if not isinstance(setting, Mapping):
        return setting
    return setting[max(first for first in setting if first <= epoch)]


def values_of(name: str, setting: Value | Mapping[int, Value]) -> list[Value]:
    """All values that a setting takes.

    Raises:
        ValueError: the epochs of a mapping are no whole numbers from 0 on.
    """
    if not isinstance(setting, Mapping):
        return [setting]
    epochs = list(setting)
    if 0 not in epochs or any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in epochs):
        raise ValueError(f"{name}: give a value, or {{0: value, epoch: value, …}} with epoch 0, got {dict(setting)}")
    return list(setting.values())
