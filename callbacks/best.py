"""The best checkpoints by a metric, on a disk that may be full."""

from weakref import proxy

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.saving import save


class _NotSaved(Exception):
    """Out of Lightning's saving, before it deletes the checkpoint that the new one was to replace."""


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a checkpoint that cannot be written leaves it, and its files, as they were.

    Whether the run goes on then is decided by callbacks/saving.py. Arguments and state are ModelCheckpoint's, under
    whose name the state also stands in checkpoints.
    """

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = {**vars(self), "best_k_models": dict(self.best_k_models)}
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        except Exception as error:  # also where the run ends: what summary.json names as the best has to be there
            vars(self).update(before)
            if not isinstance(error, _NotSaved):
                raise

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if not save(trainer, filepath, weights_only=self.save_weights_only):
            raise _NotSaved
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))
