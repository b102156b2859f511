"""The end of training that no longer improves, and of training whose validation is not finite."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.not_finite import NotFinite


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Lightning's EarlyStopping; a monitored metric that is NaN or infinite is a failed run, not a completed one.

    With `check_finite` it raises NotFinite, on all processes. Of a training metric one such value says little: the step
    is left out, and callbacks/not_finite.py counts it.
    """

    _is_first = True  # process

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_first = trainer.is_global_zero

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        if not self.check_finite or torch.isfinite(current):
            return super()._evaluate_stopping_criteria(current)
        if self.monitor.startswith("train_"):
            return False, None
        raise NotFinite(
            f"{self.monitor} is {float(current)}: training has diverged, lower model.optim.lr or set"
            " trainer.gradient_clip_val; callbacks.early_stopping.check_finite=false goes on all the same",
            told_elsewhere=not self._is_first,
        )
