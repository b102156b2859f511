"""Files that cannot be used: replaced, counted, reported once - and too many of them end the run.

Decisions that are not obvious
* An example that cannot be made gives way to the next one of the same epoch (after the last: to the first). So an item
  stays a function of (seed, epoch, index) and of the files alone: a run that was resumed, or has other workers, meets
  the same replacements.
* For the same reason no file is locked out after its first failure. One with a single bad stretch may serve for other
  crops, and whether a worker has met it before must not decide what an item holds.
* What a worker has met travels with the batch to the main process, which counts when the batch is used. So the count
  belongs to the position in training, and nothing is counted that was only prepared ahead.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Dataset, default_collate

from data.checks import number, whole_number
from data.errors import DataError, FileError
from data.kept import KeptBatches
from data.manifest import LINE_KEY, path_keys
from data.sampler import ItemKey, item_key

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 100  # examples in a row that may fail; with 1 % bad files even five do not
_MAX_SHOWN = 10
MET_KEY = "bad_files"
"""Under this key an item may bring messages of files that it could do without; it is taken out."""


class BadFiles:
    """The files of a run that cannot be used, and how many there may be.

    Args:
        max_files: that many are always accepted.
        max_fraction: so is this share of all files that `watch` was told of.
    """

    def __init__(self, *, max_files: int = 10, max_fraction: float = 0.01) -> None:
        self.max_files = whole_number("max_bad_files", max_files, least=0)
        self.max_fraction = number("max_bad_fraction", max_fraction, least=0, most=1)
        self.found: dict[str, str] = {}
        """Path -> what is wrong, with the manifest line."""
        self.num_processes = 1
        """Training processes. Only a single one stops by itself; several compare first, see `check`."""
        self._lines: dict[str, str] = {}  # path -> manifest line

    def watch(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of all files that manifest rows name, and count those that are not there.

        Raises:
            DataError: they are too many.
        """
        missing = {}
        for row in rows:
            for path in (row[key] for key in path_keys(row)):
                if path not in self._lines:
                    self._lines[path] = row.get(LINE_KEY, "")
                    if not os.path.isfile(path):
                        is_folder = os.path.isdir(path)
                        missing[path] = f"{path}: {'is a folder, a file is needed' if is_folder else 'no such file'}"
        self._note(missing)
        self.check()

    def add(self, messages: Iterable[str]) -> None:
        """Count the files that a batch met with. A single process checks the limit at once."""
        self._note({self._path(message): message for message in messages})
        if self.num_processes == 1:
            self.check()

    def merge(self, found: Mapping[str, str]) -> None:
        """Take over what another process has found."""
        for path, text in found.items():
            if path not in self.found:
                self.found[path] = text
                _report(text)

    def check(self) -> None:
        """Raises DataError with the list when there are more bad files than accepted."""
        count, num_files = len(self.found), len(self._lines)
        if count <= max(self.max_files, self.max_fraction * num_files):
            return
        shown = [self.found[path] for path in sorted(self.found)][:_MAX_SHOWN]  # the same in all processes
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        raise DataError(
            f"{count} of {num_files} files cannot be used, more than data.max_bad_files={self.max_files} and"
            f" data.max_bad_fraction={self.max_fraction:g} allow; mend them or take their rows out:\n"
            + "\n".join(shown)
        )

    def _path(self, message: str) -> str:
        """The file that a message begins with: up to the first colon, further if that is the name of a known file."""
        parts = message.split(": ")
        starts = (": ".join(parts[:count]).strip("'\"") for count in range(1, len(parts)))
        return next((start for start in starts if start in self._lines), parts[0].strip("'\""))

    def _note(self, messages: Mapping[str, str]) -> None:
        lines = {path: self._lines.get(path) for path in messages}
        self.merge({path: f"{lines[path]}: {text}" if lines[path] else text for path, text in messages.items()})


@rank_zero_only  # it hears of what the others found, see callbacks/bad_files.py
def _report(text: str) -> None:
    log.warning("examples with this file are replaced: %s", text)


class _Met(NamedTuple):
    """A batch on its way from a worker to the main process, with the messages of the bad files that it met."""

    batch: Any
    messages: list[str]


class ResilientDataset(Dataset):
    """A dataset in which an example with a bad file is replaced by the next one.

    A loader uses `collate`, and calls `receive` with each batch in the main process: there the bad files are counted,
    and the batch is what the inner dataset makes it.

    Args:
        dataset: indexed with `(index, epoch)`; raises FileError for a file that cannot be used.
        bad_files: the main process's count.

    Raises:
        DataError: a hundred examples in a row cannot be made.
    """

    def __init__(self, dataset: Dataset, bad_files: BadFiles) -> None:
        self.dataset = dataset
        self.bad_files = bad_files
        self.kept: KeptBatches | None = None  # batches that a loader need not load again

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: ItemKey | int) -> tuple[Any, list[str]]:
        """The example, and a message for each bad file that was met on the way to it."""
        messages: list[str] = []
        while len(messages) < _MAX_ATTEMPTS:
            try:
                item = self.dataset[key]
                return item, messages + (item.pop(MET_KEY, []) if isinstance(item, dict) else [])
            except FileError as error:
                messages.append(str(error))
            index, epoch = item_key(key, len(self))
            key = ((index + 1) % len(self), epoch) if len(self) > 1 else (0, epoch + 1)
        raise DataError(f"{_MAX_ATTEMPTS} examples in a row cannot be made, the last because of {messages[-1]}")

    def collate(self, items: list[tuple[Any, list[str]]]) -> Any:
        batch = getattr(self.dataset, "collate", default_collate)([item for item, _ in items])
        messages = [message for _, met in items for message in met]
        return _Met(batch, messages) if messages else batch

    def receive(self, batch: Any) -> Any:
        """Raises DataError when a single process has now met more bad files than accepted."""
        if isinstance(batch, _Met):
            batch, messages = batch
            self.bad_files.add(messages)
        return batch
