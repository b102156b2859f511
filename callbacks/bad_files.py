"""Files that were replaced because they cannot be used: counted over all processes, logged.

A single process counts by itself (data/bad_files.py) and stops at the batch that is one too many. With several, each
knows what its own examples have met. Here they compare, at moments that are the same for all, so that all of them stop
together and with the same list.
"""

from typing import Any

import pytorch_lightning as pl
import torch.distributed


class CountBadFiles(pl.Callback):
    """Collects `bad_files` of the data module over all processes; logs `bad_files`, when there are any, per epoch.

    The processes compare every *every_n_steps* training batches, at the end of each epoch, validation and test.
    The data module raises the error when there are too many. Other data modules than ours are left alone.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every_n_steps == 0:
            self._compare(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare(trainer)
        count = len(getattr(_data(trainer), "bad_files", ()))
        if count:
            pl_module.log("bad_files", float(count), sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._compare(trainer)

    def _compare(self, trainer: pl.Trainer) -> None:
        data = _data(trainer)
        if trainer.world_size > 1 and hasattr(data, "merge_bad_files"):
            data.merge_bad_files(gather(data.bad_files))


def gather(found: dict[str, str]) -> dict[str, str]:
    """The union of what all processes have found: path -> what is wrong."""
    lists: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, found)
    return {path: text for part in lists for path, text in part.items()}


def _data(trainer: pl.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
