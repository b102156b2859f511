"""The first examples of a validation or test, and when they are shown or written: what figures of any kind share."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor


class FirstExamples(pl.Callback, ABC):
    """Shows the first *num_shown* of the validation set in TensorBoard, writes the first *num_written* of the test set.

    A subclass says which of the system's `figures(batch, output)` (tag -> tensor, of the first example) are its own,
    and what showing and writing is. Validation examples are the same every time, as the data module keeps them; so
    are the order of the figures and the names. Both on rank 0 only; without a TensorBoard logger the first is left out.

    *every_n_epochs*: epochs between, counted from the first; of several validations in an epoch the first is shown.
    """

    folder: str
    """Where a test writes to, in the run directory."""

    def __init__(self, *, every_n_epochs: int, num_shown: int, num_written: int) -> None:
        self.every_n_epochs = every_n_epochs
        self.num_shown = num_shown
        self.num_written = num_written
        self._shown_epoch = -1
        self._written = 0

    @abstractmethod
    def select(self, module: pl.LightningModule, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of one example that this callback is about."""

    @abstractmethod
    def show(
        self, writer: Any, example: int, figures: dict[str, Tensor], module: pl.LightningModule, step: int
    ) -> None:
        """Put the selected figures, at least one, into TensorBoard."""

    @abstractmethod
    def write(self, stem: Path, figure: Tensor, module: pl.LightningModule) -> None:
        """Write one of them to a file, *stem* plus the ending of its kind."""

    # Moments

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_epoch = -1

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        epoch = trainer.current_epoch
        first = batch_idx == 0 and dataloader_idx == 0
        if not first or epoch == self._shown_epoch or epoch % self.every_n_epochs or trainer.sanity_checking:
            return
        writer = next((x.experiment for x in trainer.loggers if isinstance(x, TensorBoardLogger)), None)
        if writer is None or not trainer.is_global_zero:
            return
        self._shown_epoch = epoch
        for example, figures in enumerate(self._examples(pl_module, batch, outputs, self.num_shown)):
            if figures:
                self.show(writer, example, figures, pl_module, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written = 0

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or self._written >= self.num_written:
            return
        folder = Path(trainer.default_root_dir) / self.folder
        for figures in self._examples(pl_module, batch, outputs, self.num_written - self._written):
            if figures:
                folder.mkdir(parents=True, exist_ok=True)
            for tag, figure in figures.items():
                self.write(folder / f"{self._written}_{tag}", figure, pl_module)
            self._written += 1

    def _examples(self, module: pl.LightningModule, batch: Any, outputs: Any, count: int) -> list[dict[str, Tensor]]:
        """Figures of the first examples of a batch, on the CPU; none from a system that has none."""
        make = getattr(module, "figures", None)
        if make is None or not isinstance(batch, dict) or not isinstance(outputs, dict):
            return []
        size = next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
        chosen = []
        for index in range(min(count, size)):
            figures = self.select(module, make(_pick(batch, index, size), _pick(outputs, index, size)))
            chosen.append({tag: figure.detach().cpu() for tag, figure in figures.items()})
        return chosen


def _pick(tensors: dict[str, Any], index: int, size: int) -> dict[str, Any]:
    """A batch of one example: what has an entry per example keeps the one at `index`."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in tensors.items()
    }
