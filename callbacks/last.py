"""checkpoints/last.ckpt, where a resumed run continues.

Lightning's ModelCheckpoint writes its `last` beside the best one and, when both fall on one step, before the
validation of that step, which a resume then skips. This one always writes after it, and after the best one, whose
path it holds: Lightning calls callbacks of kind Checkpoint last, in their order.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Saves every *every_n_steps* optimiser steps, after each validation and at the end of training."""

    def __init__(self, *, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.global_step % self.every_n_steps == 0 and not loop._should_check_val_fx(
            trainer.fit_loop._data_fetcher
        ):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step in (0, self._saved_step) or trainer.fast_dev_run:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
