"""Drawing from several manifests by a rule (NeMo's `is_concat`), not in proportion to how much each holds."""

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from data.sampler import EpochSampler

TECHNIQUES = ("temperature", "round-robin", "random")


class ConcatSampler(EpochSampler):
    """An `EpochSampler` that chooses a part of the dataset for each place of the order, and goes through each part.

    A part that is used up begins anew, in another order. The order is a function of `(seed, epoch)`.

    Args:
        dataset: the parts one after the other.
        sizes: items of each part.
        technique: `temperature`: at random, a part in proportion to its share ** (1 / temperature); `random`: in
            proportion to `probabilities`; `round-robin`: in turn.
        temperature: 1: in proportion to the sizes; more: evener.
        probabilities: of each part.
        scale: length of an epoch over the number of items.

        Others: as `EpochSampler`.

    Raises:
        ValueError: a rule that does not fit the parts.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        sizes: Sequence[int],
        technique: str = "temperature",
        temperature: float = 1.0,
        probabilities: Sequence[float] | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        assert sum(sizes) == len(dataset)
        self._sizes = list(sizes)
        self._size = max(1, int(len(dataset) * scale))
        shares = np.asarray(sizes) / len(dataset)
        weights = shares ** (1 / temperature) if technique == "temperature" else np.asarray(probabilities or ())
        if technique == "random" and (len(weights) != len(sizes) or weights.min() < 0 or not weights.sum() > 0):
            raise ValueError(
                f"concat_sampling_probabilities must be {len(sizes)} numbers, one per manifest, got {probabilities}"
            )
        self._p = None if technique == "round-robin" else weights / weights.sum()

    def size(self) -> int:
        return self._size

    def order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        num_parts = len(self._sizes)
        in_turn = np.arange(self._size) % num_parts
        chosen = in_turn if self._p is None else rng.choice(num_parts, self._size, p=self._p)
        order = np.empty(self._size, np.int64)
        first = 0
        for part, size in enumerate(self._sizes):
            places = np.flatnonzero(chosen == part)
            rounds = range(1 + len(places) // size)
            items = np.concatenate([rng.permutation(size) if self.shuffle else np.arange(size) for _ in rounds])
            order[places] = first + items[: len(places)]
            first += size
        return order
