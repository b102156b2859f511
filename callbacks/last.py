"""checkpoints/last.ckpt, where a resumed run continues.

Lightning's ModelCheckpoint writes its `last` beside the best one and, when both fall on one step, before the
validation of that step, which a resume then skips. This one always writes after it.

It does not write where a resume could not be exact:
* in the middle of an accumulation window, whose gradients are in no checkpoint: a save that falls there, such as that
  of a validation, is made at the window's end;
* when training is about to end: Lightning does not start a run whose steps are all done, so that what follows the last
  step - a validation, the best checkpoint, the end of the epoch - would be lost to a run killed there.
  `on_train_end` saves the finished run.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from callbacks.saving import save


class LastCheckpoint(Checkpoint):
    """Saves every *every_n_steps* optimiser steps, after each validation and at the end of training."""

    def __init__(self, *, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._postponed = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        due = self._postponed or trainer.global_step % self.every_n_steps == 0
        if due and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._save_unless_ending(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._postponed = True
        else:
            self._save_unless_ending(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save_unless_ending(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._saved_step and not _is_ending(trainer):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == 0 or trainer.fast_dev_run:
            return
        self._saved_step, self._postponed = trainer.global_step, False
        save(trainer, Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")


def _is_ending(trainer: pl.Trainer) -> bool:
    stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
    return stopped or 0 <= trainer.max_steps <= trainer.global_step
