"""The mean over everything that one step of the optimiser sees, however it is spread (`loss.reduce: global`).

A loss that is a mean over what a batch happens to hold - masked frames, pixels that are not ignored - is a ratio of two
sums. The mean over micro-batches and processes of such means weighs a batch with little to count as much as one with
much, and is another one as soon as the batches are cut in another way. So each backward is on the sum, loss times
count, and the gradients are divided by the count of the whole step before anybody looks at them.

The count belongs to the gradients: it is set back when they are, and like them it is in no checkpoint. (So last.ckpt is
written at the end of an accumulation window only, see callbacks/last.py.) A run that is resumed in the middle of a
window begins with neither, and its step is the mean over the rest of the window.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# About what a batch counts, so that the gradients of sums, which fp16 has to hold, are as large as those of means. A
# constant, since processes have to agree on it, and a power of two, since dividing by that is exact.
_USUAL_COUNT = 1024.0


def mean_of_all(total: Tensor, count: Tensor) -> Tensor:
    """What *total* sums up over this process's batch, as a mean over so many things of all processes' batches.

    For losses with several terms that count different things, of which one division of the gradients cannot do justice.
    Each process gets its own share of the mean, times their number, since the mean over processes is what DDP takes of
    gradients. 0 where there was nothing to count. Without gradients each process has the mean over its own batch, so
    that they need not have the same number of batches there.

    Shape: (...), (...) -> (...).
    """
    size = 1
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        size, count = torch.distributed.get_world_size(), count.clone()
        torch.distributed.all_reduce(count)
    return size * total / count.clamp(min=1)


class CountedGradient:
    """Gradients of sums over the micro-batches of a step, and what they are to be divided by."""

    def __init__(self) -> None:
        self._count: Tensor | None = None

    def reset(self) -> None:
        """To be called when gradients are set to zero."""
        self._count = None

    def weigh(self, loss: Tensor, count: Tensor) -> Tensor:
        """What to call backward on for a *loss* that is the mean over so many things.

        Shape: (), () -> ().
        """
        count = count.detach().double()
        self._count = count if self._count is None else self._count + count
        return loss * (count / _USUAL_COUNT).to(loss.dtype)

    @torch.no_grad()
    def divide(self, parameters: Iterable[nn.Parameter], *, scale: float, distributed: bool) -> None:
        """Turns gradients of sums into the gradient of the mean; zero where there was nothing to count.

        *scale*: what they were divided by already, by the number of micro-batches and of processes. *distributed*:
        whether other processes have counts of their own.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._count is None or not gradients:
            return
        count = self._count.clone()
        if distributed:
            torch.distributed.all_reduce(count)  # not Lightning's reduce, for which the host waits
        factor = torch.where(count > 0, scale * _USUAL_COUNT / count, 0.0)
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        torch._foreach_mul_(gradients, factor.to(dtype))


class CountedMeans:
    """Means of scalars over all batches and processes, each batch weighted by what its scalars are the mean over."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, scalars: dict[str, Any], count: Tensor) -> None:
        """The scalars of a batch, finite also when there was nothing to count."""
        count = count.detach().double()
        values = [torch.as_tensor(value, device=count.device).detach().double() for value in scalars.values()]
        sums = torch.stack([*values, torch.ones_like(count)]) * count  # (scalars + 1,)
        self._names, self._sums = list(scalars), sums if self._sums is None else self._sums + sums

    def compute(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means, 0 where there was nothing to count. *reduce*: the sum over the processes."""
        if self._sums is None:
            return {}
        sums = reduce(self._sums.clone())
        means = torch.where(sums[-1] > 0, sums[:-1] / sums[-1], 0.0)
        return dict(zip(self._names, means, strict=True))
