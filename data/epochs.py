"""Settings that change while training goes on: a value, or pairs of the first epoch and the value from there on.

    pieces: 4                     always
    pieces: [[0, 4], [10, 1]]     4 in epochs 0 to 9, 1 from epoch 10 on

Pairs and not a mapping: a list that is typed replaces the one of a recipe, where a mapping would be merged into it.
"""

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value", int, float)
Setting = Value | Sequence[tuple[int, Value]]


def at_epoch(setting: Setting, epoch: int) -> Value:
    """The value of a setting in an epoch."""
    if not isinstance(setting, Sequence):
        return setting
    return max((first, value) for first, value in setting if first <= epoch)[1]


def values_of(name: str, setting: Setting) -> list[Value]:
    """All values that a setting takes.

    Raises:
        ValueError: the pairs are no pairs, or their epochs are not 0 and further whole numbers, each once.
    """
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return [setting]
    pairs = [pair for pair in setting if isinstance(pair, Sequence) and len(pair) == 2]
    epochs = [pair[0] for pair in pairs]
    whole = all(isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 for epoch in epochs)
    if len(pairs) < len(setting) or 0 not in epochs or not whole or len(set(epochs)) < len(epochs):
        raise ValueError(f"{name}: give a value, or [[0, value], [epoch, value], …] from epoch 0 on, got {setting}")
    return [pair[1] for pair in pairs]
