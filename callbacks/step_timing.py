"""How long single steps take, under NeMo's names; what a run costs as a whole is callbacks/monitor.py."""

import time
from collections import defaultdict, deque
from typing import Any

import pytorch_lightning as pl
import torch


class StepTiming(pl.Callback):
    """Logs `train_step_timing in s`, `train_backward_timing in s`, and `validation_step_timing in s` and
    `test_step_timing in s` as means over all their batches.

    Seconds between the hooks around a batch, or around the backward pass, waiting for data excluded. A GPU works on
    behind the hooks, so that a single value is right with *sync_cuda* only, which costs a synchronisation each.

    *buffer_size*: a value of training is the mean over so many; of a backward pass, so many micro-batches.

    Raises ValueError for values out of range.
    """

    def __init__(self, *, buffer_size: int = 1, sync_cuda: bool = False) -> None:
        if isinstance(buffer_size, bool) or not isinstance(buffer_size, int) or buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size}: give a whole number of at least 1")
        if not isinstance(sync_cuda, bool):
            raise ValueError(f"sync_cuda={sync_cuda}: give true or false")
        self.sync_cuda = sync_cuda
        self._last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))
        self._started: dict[str, float] = {}

    def _starts(self, name: str) -> None:
        self._started[name] = self._now()

    def _ends(self, name: str, pl_module: pl.LightningModule, *, epoch: bool = False) -> None:
        value = self._now() - self._started[name]
        if not epoch:
            self._last[name].append(value)
            value = sum(self._last[name]) / len(self._last[name])
        # batch_size=1, or Lightning would look for it in the batch
        pl_module.log(f"{name} in s", value, on_step=not epoch, on_epoch=epoch, sync_dist=epoch, batch_size=1)

    def _now(self) -> float:
        if self.sync_cuda and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._starts("train_step_timing")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._starts("train_backward_timing")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ends("train_backward_timing", pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._ends("train_step_timing", pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._starts("validation_step_timing")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._ends("validation_step_timing", pl_module, epoch=True)

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._starts("test_step_timing")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._ends("test_step_timing", pl_module, epoch=True)
