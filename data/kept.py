"""Batches that stay on the training device: those of a first pass, for all later ones.

They are the first ones of a pass, in its order, as many as the limit allows; a loader begins behind them. They belong
to the process that trains: a loader's workers, to which the dataset that holds them goes, get none.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

log = logging.getLogger(__name__)


class KeptBatches:
    """The first batches of each pass over a stage's data. *stage*: for messages."""

    def __init__(self, stage: str, device: torch.device, limit_mb: int) -> None:
        self.stage, self.device, self.limit_mb = stage, device, limit_mb
        self._batches: list[Any] = []
        self._num_bytes, self._full = 0, False

    def __len__(self) -> int:
        return len(self._batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_batches": []}

    def behind(self, index_sampler: Any) -> "_Behind":
        """What a loader still has to load, of a sampler of batches."""
        return _Behind(index_sampler, self)

    def all_of_a_pass(self, load: Callable[[], Iterable[Any]], num_batches: int) -> Iterator[Any]:
        """Those that are kept, and then those that *load* begins with behind them."""
        position = 0
        while position < len(self):
            yield _own(self._batches[position])
            position += 1
        for batch in load() if position < num_batches else ():
            yield _own(self._keep(batch, position, num_batches))
            position += 1

    def _keep(self, batch: Any, position: int, num_batches: int) -> Any:
        if self._full or position != len(self):
            return batch
        num_bytes = 0

        def moved(tensor: Tensor) -> Tensor:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return tensor.to(self.device)

        there = apply_to_collection(batch, Tensor, moved)
        if self._num_bytes + num_bytes > self.limit_mb * 2**20:
            self._full = True
            log.info(
                "%d of the %d batches of %s stay on the device: data.loader.keep_on_device_mb=%d has no room for more",
                position,
                num_batches,
                self.stage,
                self.limit_mb,
            )
            return there
        self._batches.append(there)
        self._num_bytes += num_bytes
        return there


def _own(batch: Any) -> Any:
    """A batch of one's own to put things into; its tensors are shared."""
    return dict(batch) if isinstance(batch, dict) else batch


class _Behind:
    """A sampler of batches without the first ones; as long as with them, since a pass has all."""

    def __init__(self, index_sampler: Any, kept: Sized) -> None:
        self._index_sampler, self._kept = index_sampler, kept

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._index_sampler), len(self._kept), None)

    def __len__(self) -> int:
        return len(self._index_sampler)
