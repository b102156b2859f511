"""What a run costs: examples per second, step time, waiting for data, CPU load, memory, wall-clock and CPU time.

Times are those at which hooks are called, without asking the device anything: a GPU that is still busy shows in the
following hooks, so the mean over many steps is right, a single step's time is not. Load and memory are asked for once
per window (callbacks/host.py).
"""

import logging
import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import clock
from callbacks.host import CpuMeter, gpu_memory, host_memory_mb, num_cores
from callbacks.window import Window, from_state

log = logging.getLogger("monitor")


class Monitor(pl.Callback):
    """Logs what training costs, per window of steps, and sums it up for summary.json and at the end of training.

    * `examples_per_s`, over all processes: of training, waiting included, validation and saving excluded. An example
      is an entry of dimension 0 of the batch's first tensor.
    * `data_wait_share`, 0 to 1: the time between two batches, less what validation takes. The one in which a
      checkpoint is saved is left out, and so is the time before the first batch.
    * `step_s`: seconds of a batch, waiting for it excluded. `batch_size`: examples per batch and process.
    * `cpu_s`, with each validation: CPU seconds of all processes and their descendants so far, resumed runs included.
    * `cpu_load`, 0 to 1: share of the cores that this process and its descendants used, validation included.
    * `host_mem_mb`: MiB resident in them; `gpu_mem_mb`, `gpu_mem_reserved_mb`, `gpu_mem_share`, on a GPU.

    *log_every_n_steps*: optimiser steps over which one value is taken, null for the Trainer's.
    """

    def __init__(self, *, log_every_n_steps: int | None = None) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps={log_every_n_steps}: give at least 1, or null for the Trainer's")
        self.log_every_n_steps = log_every_n_steps
        self.examples_per_s: float | None = None  # of the last window
        self.data_wait_share: float | None = None
        self._total = Window()
        self._window = Window()
        self._earlier = {"wall_s": 0.0, "cpu_s": 0.0, "peak_mem_mb": 0.0}  # runs that this one resumes
        self._trainer: pl.Trainer | None = None
        self._cpu: CpuMeter | None = None  # while training
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
        self._cpu = CpuMeter()

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
        size = _batch_size(batch)
        self._window.batches += 1
        self._window.examples += size * trainer.world_size
        self._window.own_examples += size
        self._window.step_s += self._batch_ended - self._batch_started
        steps = self.log_every_n_steps or trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if trainer.global_step - self._closed_at_step >= steps:
            self._closed_at_step = trainer.global_step
            means = self._close_window()
            self.examples_per_s, self.data_wait_share = means["examples_per_s"], means["data_wait_share"]
            for name, value in means.items():
                if value is not None:
                    # batch_size=1, or Lightning would look for it in the batch
                    pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
            self._batch_ended = time.perf_counter()  # measuring is no waiting for data

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":  # beside what was reached, what it has cost
            pl_module.log("cpu_s", self.summary()["cpu_s"], sync_dist=True, reduce_fx="sum", batch_size=1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batch_ended is not None:
            self._batch_ended += time.perf_counter() - self._validation_started

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._batch_ended = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_window()  # the steps since the last one; too late to log
        self._cpu = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            log.info("%s", describe(self.summary()))

    def _close_window(self) -> dict[str, float | None]:
        used, offered = self._cpu.take() if self._cpu else (0.0, 0.0)
        measured = Window(used_cpu_s=used, offered_cpu_s=offered, host_mem_mb=host_memory_mb(), **gpu_memory())
        self._window += measured
        means = self._window.means()
        self._total += self._window
        self._window = Window()
        return means

    # Sums

    def summary(self) -> dict[str, Any]:
        """Of this run and the ones it resumes: `steps`, and what is logged, over all steps; memory is the largest.

        `wall_s` and `cpu_s` are those of callbacks/clock.py. `peak_mem_mb` in MiB: allocated on the process's GPU, or
        resident in the main process where there is none. What was not measured is None.
        """
        return {
            "steps": self._trainer.global_step if self._trainer else 0,
            "wall_s": self._earlier["wall_s"] + clock.wall_seconds(),
            "cpu_s": self._earlier["cpu_s"] + clock.cpu_seconds(),
            "peak_mem_mb": max(self._earlier["peak_mem_mb"], _peak_memory_mb()),
            **(self._total + self._window).means(),
        }

    def state_dict(self) -> dict[str, Any]:
        sums = {key: value for key, value in self.summary().items() if key in self._earlier}
        return {**sums, **vars(self._total + self._window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # a test that loads the best checkpoint does not resume anything
        self._earlier = {key: state_dict[key] for key in self._earlier}
        self._total = from_state(state_dict)


def describe(summary: dict[str, Any]) -> str:
    """What `Monitor.summary` returns, as lines of text."""

    def number(name: str, pattern: str = "{:.3g}") -> str:
        return "not measured" if summary[name] is None else pattern.format(summary[name])

    gpu = "no GPU"
    if summary["gpu_mem_mb"] is not None:
        gpu = (
            f"{summary['gpu_mem_mb']:.0f} MiB between steps, {summary['peak_mem_mb']:.0f} at most,"
            f" {summary['gpu_mem_reserved_mb']:.0f} reserved, {summary['gpu_mem_share']:.0%} of the device taken"
        )
    lines = {
        "steps": f"{summary['steps']}",
        "batch size": number("batch_size"),
        "examples/s": number("examples_per_s"),
        "mean step": number("step_s", "{:.3g} s"),
        "data wait": number("data_wait_share", "{:.0%}"),
        "CPU load": number("cpu_load", "{:.0%} of " + str(num_cores()) + " cores"),
        "host memory": number("host_mem_mb", "{:.0f} MiB"),
        "GPU memory": gpu,
    }
    return "\n".join(f"{name:<15}  {value}" for name, value in lines.items())


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 1)


def _peak_memory_mb() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    # In KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
