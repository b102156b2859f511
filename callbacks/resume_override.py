"""Optimiser values that a resumed run takes from its command line instead of from the checkpoint."""

from typing import Any

import pytorch_lightning as pl


class ResumeOverride(pl.Callback):
    """Sets *values* (name -> value of the optimiser's groups, such as lr) once the checkpoint has been restored.

    A new `lr` is a new base rate: a schedule keeps its shape and goes on from where it is. In a run that scales
    rates with its batch it is scaled too.
    """

    def __init__(self, *, values: dict[str, Any]) -> None:
        self.values = values

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = dict(self.values)
        rate = values.pop("lr", None)
        if rate is not None:
            rate *= getattr(pl_module, "lr_scale", None) or 1.0
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.update(values)
                if rate is not None:
                    progress = group["lr"] / group["initial_lr"] if "initial_lr" in group else 1.0
                    group["lr"] = rate * progress
                    group["initial_lr"] = rate
        for config in trainer.lr_scheduler_configs:
            if rate is not None and hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [rate] * len(config.scheduler.base_lrs)
