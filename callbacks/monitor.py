"""What a run costs: examples per second, how long it waits for data, memory, wall-clock and CPU time.

Measured from the times at which hooks are called, without asking the device anything: a GPU that is still busy shows
in the following hooks, so the mean over many steps is right, a single step's time is not.
"""

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import clock


class Monitor(pl.Callback):
    """Logs `examples_per_s` (over all ranks) and `data_wait_share` (0 to 1) and sums them up for summary.json.

    The time between two batches is waiting for data, less what validation takes; the one in which a checkpoint is
    saved is left out, and so is the time before the first batch. Examples per second are those of training, waiting
    included, validation and saving excluded. An example is an entry of dimension 0 of the batch's first tensor.

    *log_every_n_steps*: optimiser steps over which one value is taken, null for the Trainer's.
    """

    def __init__(self, *, log_every_n_steps: int | None = None) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps={log_every_n_steps}: give at least 1, or null for the Trainer's")
        self.log_every_n_steps = log_every_n_steps
        self.examples_per_s: float | None = None  # of the last window
        self.data_wait_share: float | None = None
        self._total = _Window()
        self._window = _Window()
        self._earlier = {"wall_s": 0.0, "cpu_s": 0.0, "peak_mem_mb": 0.0}  # runs that this one resumes
        self._trainer: pl.Trainer | None = None
        self._batch_started = 0.0
        self._batch_ended: float | None = None  # None: the coming gap is not to be counted
        self._validation_started = 0.0
        self._closed_at_step = 0

    # Time

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch_ended = None
        self._closed_at_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_started = time.perf_counter()
        if self._batch_ended is not None:
            self._window.wait_s += max(0.0, self._batch_started - self._batch_ended)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_ended = time.perf_counter()
        self._window.step_s += self._batch_ended - self._batch_started
        self._window.examples += _batch_size(batch) * trainer.world_size
        self._window.batches += 1
        steps = self.log_every_n_steps or trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if trainer.global_step - self._closed_at_step >= steps:
            self._closed_at_step = trainer.global_step
            self.examples_per_s, self.data_wait_share = self._window.examples_per_s, self._window.data_wait_share
            for name in ("examples_per_s", "data_wait_share"):
                # batch_size=1, or Lightning would look for it in the batch
                pl_module.log(name, getattr(self, name), on_step=True, on_epoch=False, batch_size=1)
            self._total += self._window
            self._window = _Window()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batch_ended is not None:
            self._batch_ended += time.perf_counter() - self._validation_started

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._batch_ended = None

    # Sums

    def summary(self) -> dict[str, Any]:
        """Of this run and the ones it resumes: steps, wall_s, cpu_s, examples_per_s, data_wait_share, peak_mem_mb.

        `wall_s` and `cpu_s` are those of callbacks/clock.py. Before the first batch the shares are None.
        `peak_mem_mb` in MiB: allocated on the rank's GPU, or resident in the main process where there is none.
        """
        used = self._total + self._window
        return {
            "steps": self._trainer.global_step if self._trainer else 0,
            "wall_s": self._earlier["wall_s"] + clock.wall_seconds(),
            "cpu_s": self._earlier["cpu_s"] + clock.cpu_seconds(),
            "examples_per_s": used.examples_per_s,
            "data_wait_share": used.data_wait_share,
            "peak_mem_mb": max(self._earlier["peak_mem_mb"], _peak_memory_mb()),
        }

    def state_dict(self) -> dict[str, Any]:
        used = self._total + self._window
        sums = {key: value for key, value in self.summary().items() if key in self._earlier}
        return {**sums, **vars(used)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # a test that loads the best checkpoint does not resume anything
        self._earlier = {key: state_dict[key] for key in self._earlier}
        self._total = _Window(**{key: state_dict[key] for key in vars(self._total)})


class _Window:
    """Sums over some batches."""

    def __init__(self, batches: int = 0, examples: int = 0, step_s: float = 0.0, wait_s: float = 0.0) -> None:
        self.batches = batches
        self.examples = examples
        self.step_s = step_s
        self.wait_s = wait_s

    def __add__(self, other: "_Window") -> "_Window":
        return _Window(**{key: value + vars(other)[key] for key, value in vars(self).items()})

    @property
    def examples_per_s(self) -> float | None:
        return self.examples / (self.step_s + self.wait_s) if self.batches else None

    @property
    def data_wait_share(self) -> float | None:
        return self.wait_s / (self.step_s + self.wait_s) if self.batches else None


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 1)


def _peak_memory_mb() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    # In KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
