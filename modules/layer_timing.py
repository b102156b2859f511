"""Up to which rank a factorised layer is faster than a dense one, measured here and now, forward and backward.

Counting operations does not tell: two small products instead of one large one cost calls and memory, by how much
depends on the machine, the shapes and the precision.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.low_rank import blank, break_even_rank

_ROUNDS = 5  # at least, and so many that short ones find a moment without a disturbance:
_SECONDS = 0.02
_PERCENT = (90, *range(80, 0, -5))  # of the full rank, tried from the largest on


class Worth(NamedTuple):
    """*max_rank*: the largest rank tried that is faster by enough, 0: none is. *speedups*: rank -> ratio of times."""

    max_rank: int
    speedups: dict[int, float]


@contextmanager
def recorded_inputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The input that each layer saw last while the context was open, by name: without values, with shape and dtype."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = torch.empty_like((*inputs, *named.values())[0], device="meta")

        return hook

    handles = [layer.register_forward_pre_hook(remember(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def fastest_ranks(
    layers: dict[str, nn.Module],
    inputs: dict[str, Tensor],
    *,
    min_speedup: float,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Worth]:
    """For each layer the largest rank at which it is *min_speedup* times as fast; layers that are alike are timed once.

    *inputs*: as `recorded_inputs` gives them; a layer that is not in it was never called and has none. *context*: in
    which the layers run, such as autocast.
    """
    timed: dict[tuple[Any, ...], Worth] = {}
    found = {}
    for name, layer in layers.items():
        if name not in inputs:
            found[name] = Worth(0, {})
            continue
        key = (repr(layer), tuple(inputs[name].shape), inputs[name].stride(), inputs[name].dtype)
        if key not in timed:
            timed[key] = _measure(layer, inputs[name], min_speedup, context)
        found[name] = timed[key]
    return found


def _measure(
    layer: nn.Module, like: Tensor, min_speedup: float, context: Callable[[], AbstractContextManager[Any]]
) -> Worth:
    weight: Any = layer.weight
    x = torch.empty_like(like, device=weight.device).fill_(0.5).requires_grad_(True)
    full = min(weight.flatten(1).shape)
    speedups: dict[int, float] = {}
    for percent in _PERCENT:
        rank = max(1, percent * full // 100)
        if rank in speedups or rank > break_even_rank(weight.shape):
            continue
        # Copies: no gradient is left behind on the network's parameters.
        dense, low = _filled(copy.deepcopy(layer)), _filled(blank(layer, rank))
        times: dict[nn.Module, list[float]] = {dense: [], low: []}
        begun = time.perf_counter()
        while len(times[low]) <= _ROUNDS or time.perf_counter() - begun < _SECONDS:
            for module, taken in times.items():  # in turn; the first round is no measurement
                taken.append(_seconds(module, x, context))
        speedups[rank] = round(min(times[dense][1:]) / min(times[low][1:]), 3)
        if speedups[rank] >= min_speedup:
            return Worth(rank, speedups)
    return Worth(0, speedups)


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """With values that are not random, so that no random state is touched, and neither zero nor denormal."""
    for parameter in module.parameters():
        parameter.fill_(0.01)
    return module.requires_grad_(True).train()


def _seconds(module: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[Any]]) -> float:
    _wait(x)
    begun = time.perf_counter()
    with torch.enable_grad():
        with context():
            output = module(x)
        output.sum().backward()
    _wait(x)
    taken = time.perf_counter() - begun
    x.grad = None
    module.zero_grad(set_to_none=True)
    return taken


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
