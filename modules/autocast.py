"""Parts of a network that must not run in half precision: front ends, scores, softmax over time, cumulative norms."""

from contextlib import AbstractContextManager, nullcontext

import torch

from modules.checks import choices

PRECISIONS = ("auto", "32", "bf16", "16")


def without_autocast(device_type: str) -> AbstractContextManager:
    """Full precision inside; no context at all where autocast is off, so that exported graphs stay plain."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def inference_autocast(device_type: str, precision: str = "auto") -> AbstractContextManager:
    """Lower precision for a trained network: `32` none, `bf16` or `16` that one, `auto` on a GPU bf16 where it has
    that and 16 elsewhere, on a CPU none.

    Raises ValueError for another name.
    """
    choices(precision=(precision, PRECISIONS))
    if precision == "32" or (precision == "auto" and device_type != "cuda"):
        return nullcontext()
    half = precision == "16" or (precision == "auto" and not torch.cuda.is_bf16_supported())
    return torch.autocast(device_type, dtype=torch.float16 if half else torch.bfloat16)
