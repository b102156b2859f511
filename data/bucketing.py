"""Batches of recordings that last about as long as each other, so that little is padded.

Decisions that are not obvious
* The order is cut into batches of all ranks together: in each step all ranks have recordings of alike duration, and as
  many of them, so none waits for another.
* Durations are blurred by up to 10 % before they are sorted. Otherwise a recording would meet the same others in every
  epoch.
* Which recordings share a batch depends on the size of the batch. After a resume with another batch size or another
  number of processes some recordings of that epoch come twice and others not at all.
"""

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from data.sampler import EpochSampler

_BLUR = 0.1


class BucketSampler(EpochSampler):
    """An `EpochSampler` whose batches hold items of alike duration; batches come in random order.

    The order is a function of `(seed, epoch, batch_size * num_replicas)`. With `drop_last` every rank has the same
    number of whole batches, and the items that are left out are others in each epoch.

    Args:
        dataset: anything with a length.
        durations_s: how long each item lasts.

        Others: as `EpochSampler`.
    """

    def __init__(self, dataset: Sized, *, durations_s: Sequence[float], **options: Any) -> None:
        super().__init__(dataset, **options)
        assert len(durations_s) == len(dataset)
        self._durations_s = np.asarray(durations_s, np.float64)

    def __len__(self) -> int:
        together = self.batch_size * self.num_replicas
        return self.size() // together * self.batch_size if self.drop_last else super().__len__()

    def order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        size, together = self.size(), self.batch_size * self.num_replicas
        num_batches = size // together
        items = rng.permutation(size) if self.shuffle else np.arange(size)
        items = items[: num_batches * together] if self.drop_last else items
        blur = rng.uniform(1 - _BLUR, 1 + _BLUR, len(items)) if self.shuffle else 1.0
        items = items[np.argsort(self._durations_s[items] * blur, kind="stable")]
        whole, rest = np.split(items, [num_batches * together])
        whole = whole.reshape(num_batches, together)
        return np.append(rng.permutation(whole) if self.shuffle else whole, rest)
