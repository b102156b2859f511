"""Which items an epoch visits, in which order, on which rank, from where on.

Decisions that are not obvious
* A sampler yields `(index, epoch)`, and a dataset draws all randomness of an item from
  `np.random.default_rng([seed, epoch, index])`. So an item does not depend on the worker, the rank or a
  resume.
* The position is kept per epoch: `skip` items are passed over in epoch `start_epoch` however often
  Lightning asks for an iterator, and in no other. Epochs before `start_epoch` do not exist: a checkpoint
  written after the last batch of an epoch makes Lightning announce the finished epoch first and workers
  fetch ahead at once.
"""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import DistributedSampler

ItemKey = tuple[int, int]
"""What a dataset is indexed with: `(index, epoch)`."""


def item_key(key: ItemKey | int, num_items: int) -> ItemKey:
    """The pair that a dataset of `num_items` was indexed with. A bare index (Lightning's overfit mode) is of epoch 0.

    Raises IndexError for an index that is none, by which Python ends a loop over a dataset.
    """
    index, epoch = (key, 0) if isinstance(key, int) else key
    if not 0 <= index < num_items:
        raise IndexError(f"item {index} of {num_items}")
    return index, epoch


class EpochSampler(DistributedSampler):
    """`(index, epoch)` pairs of one rank; the order is a function of `(seed, epoch)`.

    For training (`drop_last=True`) every rank gets `len(dataset) // num_replicas` items; a remainder is
    left out, another one each epoch. For evaluation (`drop_last=False`) every item is visited, and none
    twice where that can be: only where ranks would get different numbers of batches - a model with batch
    norm would then wait for ever in its buffer exchange - the ranks that come short repeat one item (the
    first of the epoch). With one process, or when `num_replicas` divides the length, that never happens.

    It is a `DistributedSampler`, so Lightning neither wraps it nor fails to call `set_epoch` on it.

    Args:
        dataset: anything with a length.
        seed: seed of the order.
        shuffle: draw a new order each epoch; otherwise count up.
        drop_last: equal lengths by leaving out (training) or visiting all (evaluation).
        batch_size: items per batch, to know the number of batches when `drop_last` is False.
        rank: this process.
        num_replicas: number of processes.
        fixed_epoch: yield this epoch always, for validation items that never change.
        start_epoch: epoch to begin with after a resume.
        skip: items of this rank done already in `start_epoch`.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        batch_size: int = 1,
        rank: int = 0,
        num_replicas: int = 1,
        fixed_epoch: int | None = None,
        start_epoch: int = 0,
        skip: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        if skip < 0 or start_epoch < 0:
            raise ValueError(f"start_epoch {start_epoch} and skip {skip} must not be negative")
        self.batch_size = batch_size
        self.fixed_epoch = fixed_epoch
        self.start_epoch = start_epoch
        self.skip = skip
        self.epoch = start_epoch

    def size(self) -> int:
        """Items that all ranks visit together in an epoch, before any is left out."""
        return len(self.dataset)  # type: ignore[arg-type]

    def order(self, epoch: int) -> np.ndarray:
        """Indices in the order in which the ranks take turns with them, `(size,)`."""
        size = self.size()
        return np.random.default_rng([self.seed, epoch]).permutation(size) if self.shuffle else np.arange(size)

    def __len__(self) -> int:
        """Items of this rank in a whole epoch, whatever `skip` is: Lightning counts on from where it was."""
        size = self.size()
        if self.drop_last:
            return size // self.num_replicas
        short, longer = size // self.num_replicas, size % self.num_replicas
        own = short + (self.rank < longer)
        most_batches = -(-(short + (longer > 0)) // self.batch_size)
        return own if -(-own // self.batch_size) == most_batches else own + 1

    def __iter__(self) -> Iterator[ItemKey]:
        epoch = self.epoch if self.fixed_epoch is None else self.fixed_epoch
        order = self.order(epoch)
        own = order[self.rank :: self.num_replicas][: len(self)]
        if len(own) < len(self):
            own = np.append(own, order[0])
        done = self.skip if self.epoch == self.start_epoch else 0
        return iter([(int(index), epoch) for index in own[done:]])

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = max(epoch, self.start_epoch)
