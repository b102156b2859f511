"""Parts of a network that must not run in half precision: front ends, scores, softmax over time, cumulative norms."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager:
    """Full precision inside; no context at all where autocast is off, so that exported graphs stay plain."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
