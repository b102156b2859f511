"""Batches that fit: their size follows the memory in use, and one that did not fit is split and tried again.

| what happened | next size |
|---|---|
| out of memory, or more than 90 % of the memory in use | half |
| more than 95 % of the recent batches went through, less than 70 % of the memory in use | double |
| anything else | the same |

Use counts everything on the device, other processes and torch's cache of freed blocks included: what a batch needed at
its peak stays in that cache until it is emptied, which costs time and is therefore done only after running out of
memory and above 80 %.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from modules.checks import whole_numbers

RECENT_BATCHES = 20
EMPTY_CACHE_ABOVE = 0.8


def next_size(
    size: int,
    *,
    least: int,
    most: int,
    success_rate: float = 1.0,
    memory_share: float = 0.0,
    out_of_memory: bool = False,
) -> int:
    """Size of the next batch by the table above, from *least* to *most* items.

    *success_rate*: share of the recent batches that did not run out of memory. *memory_share*: of the device, in use.

    >>> next_size(12, least=1, most=32, memory_share=0.5)
    24
    >>> next_size(12, least=1, most=32, out_of_memory=True)
    6
    """
    if out_of_memory or memory_share > 0.9:
        return max(least, size // 2)
    if success_rate > 0.95 and memory_share < 0.7:
        return min(most, size * 2)
    return size


def cuda_memory_share() -> float:
    """Share of the current device's memory that is in use, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / total


class AdaptiveBatch:
    """Runs a function over items in batches, and keeps the size that it found from one run to the next.

    Arguments
        size: items of the first batch. least, most: limits of what follows.
        adapt: whether the size follows the memory of the current CUDA device (None: if there is one). Without, it is
            constant until a batch runs out of memory, which halves it on any device.

    Raises ValueError for sizes that do not fit each other.

    >>> batch = AdaptiveBatch(size=2, adapt=False)
    >>> torch.stack(list(batch.run(lambda stack: 10 * stack, torch.arange(5))))
    tensor([ 0, 10, 20, 30, 40])
    """

    def __init__(self, *, size: int = 8, least: int = 1, most: int = 32, adapt: bool | None = None) -> None:
        whole_numbers(size=size, least=least, most=most)
        if not least <= size <= most:
            raise ValueError(f"batch sizes must be least <= size <= most, got {least}, {size}, {most}")
        self.size = size
        self.least = least
        self.most = most
        self.adapt = torch.cuda.is_available() if adapt is None else adapt
        self._succeeded: deque[bool] = deque(maxlen=RECENT_BATCHES)

    @property
    def success_rate(self) -> float:
        """Share of the recent batches that did not run out of memory, 1 before any."""
        return sum(self._succeeded) / len(self._succeeded) if self._succeeded else 1.0

    def run(self, function: Callable[[Tensor], Tensor], items: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields one result per item, in order.

        Items, all of one shape, are taken and results handed on batch by batch, so that neither need all be in memory.
        Nothing happens before the first result is asked for.

        *function*: (n, ...) -> (n, ...), n from 1 to `size`. When it raises torch.OutOfMemoryError, the items of that
        batch and no others go through it again, in halves; a batch of `least` items or fewer raises. Every other error
        passes through.
        """
        source = iter(items)
        waiting: deque[Tensor] = deque()  # taken, but without a result
        while True:
            waiting.extend(islice(source, max(self.size - len(waiting), 0)))
            if not waiting:
                return
            batch = list(islice(waiting, self.size))
            results = self._try(function, batch)
            if results is not None:
                for _ in batch:
                    waiting.popleft()
                yield from results

    def _try(self, function: Callable[[Tensor], Tensor], batch: list[Tensor]) -> Tensor | None:
        """The results, or None and a smaller size."""
        try:
            results = function(torch.stack(batch))
        except torch.OutOfMemoryError:
            if len(batch) <= self.least:
                raise
            results = None
        # Not in the handler: its exception holds the frames, and with them the tensors that filled the memory.
        self._succeeded.append(results is not None)
        if results is None:
            torch.cuda.empty_cache()
            # Of what failed: the last batch of a run is smaller than the size.
            self.size = next_size(len(batch), least=self.least, most=self.most, out_of_memory=True)
            return None
        if len(results) != len(batch):
            raise ValueError(f"the function gave {len(results)} results for a batch of {len(batch)} items")
        if self.adapt:
            share = cuda_memory_share()
            if share > EMPTY_CACHE_ABOVE:
                torch.cuda.empty_cache()
            self.size = next_size(
                self.size, least=self.least, most=self.most, success_rate=self.success_rate, memory_share=share
            )
        return results
