"""Weights of one shape side by side, as stacks of matrices, so that one call works on all of them."""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

STACK_ELEMENTS = 2**24
"""In one stack, or one weight, whichever is more: memory for copies stays bounded."""


class Stack(NamedTuple):
    """Weights of one shape, type and device, with their names."""

    names: list[str]
    weights: list[nn.Parameter]
    shape: tuple[int, int]
    """As matrices: flattened behind the first axis."""


def find_stacks(
    model: nn.Module,
    *,
    min_elements: int = 0,
    include: list[re.Pattern[str]] | None = None,
    exclude: list[re.Pattern[str]] | None = None,
) -> list[Stack]:
    """All trainable weights with two or more axes.

    Args:
        min_elements: smaller ones are left out.
        include, exclude: searched in the names; None includes all, excludes none.
    """
    alike: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad or weight.ndim < 2 or weight.numel() < min_elements:
            continue
        if include and not any(pattern.search(name) for pattern in include):
            continue
        if any(pattern.search(name) for pattern in exclude or ()):
            continue
        shape = (weight.shape[0], math.prod(weight.shape[1:]))
        alike.setdefault((shape, weight.dtype, weight.device), []).append((name, weight))
    stacks = []
    for (shape, *_), found in alike.items():
        size = max(1, STACK_ELEMENTS // max(1, math.prod(shape)))
        for start in range(0, len(found), size):
            names, weights = zip(*found[start : start + size], strict=True)
            stacks.append(Stack(list(names), list(weights), shape))
    return stacks


def stack_kept(
    store: dict[str, Tensor], names: list[str], shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    """What a store keeps for these names, zeros for one that it does not know or keeps in another shape.

    None where that is all of them. Shape: (len(names), *shape).
    """
    kept = [store.get(name) for name in names]
    kept = [value if value is not None and value.shape == shape else None for value in kept]
    like = next((value for value in kept if value is not None), None)
    if like is None:
        return None
    return torch.stack([(like.new_zeros(shape) if value is None else value).to(device) for value in kept])
