"""Gradient checkpointing: what a part of a network computes is not kept for the backward pass, but computed once more.

Chen et al., "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174. Memory for activations falls to
the parts' inputs and the inside of one part; each step computes the forward pass of the parts twice.

In place, so that names of weights, and with them checkpoints, stay the same; in training alone. The second pass draws
the same random numbers as the first, and what it would count once more in buffers (batch norm's statistics) is thrown
away: losses, gradients and buffers are those of a training without it, bit for bit where the kernels are deterministic.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modules.compilation import called


def recompute_in_training(modules: Iterable[nn.Module]) -> None:
    """Let modules keep their inputs alone for the backward pass; of a ModuleList each for itself. Twice is once."""
    for module in called(modules):
        vars(module)["forward"] = partial(_forward, module)  # a partial: a copy of the module gets one of its own


def _forward(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not (module.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    contexts = partial(_contexts, module)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _contexts(module: nn.Module) -> Any:
    """Of the first and of the second pass."""
    return nullcontext(), _spare_buffers(module)


@contextmanager
def _spare_buffers(module: nn.Module) -> Iterator[None]:
    """Copies stand in the place of all buffers; what is written to them is lost."""
    own = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    for part, buffers in own:
        part._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.update(buffers)
