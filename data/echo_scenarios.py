"""What made and recorded examples of echo cancellation share: their scenarios and their batch.

double_talk   both ends speak
far_end       only the far end speaks: the target is silence
near_end      only the near end speaks: there is no echo
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

SCENARIOS = ("double_talk", "far_end", "near_end")
"""The names; an item holds the index."""

SCENARIO_WEIGHTS = {"double_talk": 0.5, "far_end": 0.25, "near_end": 0.25}
"""How often each comes, relative to the others, where nothing else is asked for."""


def scenario_probabilities(weights: Mapping[str, float]) -> list[float]:
    """Probabilities in the order of `SCENARIOS`; a scenario without weight never comes.

    Raises:
        ValueError: an unknown scenario, a weight that is no number of 0 or more, or none above 0.
    """
    if not isinstance(weights, Mapping) or not set(weights) <= set(SCENARIOS):
        raise ValueError(f"scenario_weights must be a weight for each of {', '.join(SCENARIOS)}, got {weights!r}")
    values = [weights.get(name, 0) for name in SCENARIOS]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or not all(0 <= value < math.inf for value in values) or sum(values) == 0:
        raise ValueError(f"scenario_weights must be numbers of 0 or more, one of them above 0, got {weights!r}")
    return [value / sum(values) for value in values]


def collate_echo(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items that have the same keys; shorter signals are padded with zeros at the end.

    Shape:
        item: signals `(T,)` (mic, far, target, and the components near, echo, noise where they are known), spectra
        `(F, frames, 2)` (mic_spectrum, far_spectrum where they are kept), numbers `()` (has_target, length, scenario,
        delay_samples, path_change_sample, ser_db, snr_db), name str
        -> `(B, T)`, `(B, F, frames, 2)`, `(B,)`, list of B.
    """

    def batched(values: list[Any]) -> Any:
        if isinstance(values[0], str):
            return values
        if values[0].ndim == 3:
            longest = max(value.shape[1] for value in values)
            return torch.stack([pad(value, (0, 0, 0, longest - value.shape[1])) for value in values])
        longest = max(value.numel() for value in values)
        return torch.stack([v if v.numel() == longest else pad(v, (0, longest - len(v))) for v in values])

    return {key: batched([item[key] for item in items]) for key in items[0]}
