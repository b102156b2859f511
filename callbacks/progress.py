"""How training goes: a bar on a terminal, plain lines of text everywhere else.

One class decides for itself, since a configuration names a class, and is a Lightning ProgressBar, so that Lightning
adds none of its own (it would take rich's whenever that is installed).
"""

import logging
import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from callbacks.monitor import Monitor

log = logging.getLogger("progress")

_REFRESH_S = 0.2


class Progress(TQDMProgressBar):
    """A tqdm bar where stderr is a terminal; otherwise, through the logger `progress`, a line every so many steps.

    A line of training holds epoch, step, mean loss since the last line, learning rate, and what the Monitor callback
    measured; a validation gets a line with its metrics. Lines come from rank 0 only.

    `trainer.enable_progress_bar=false` and this callback exclude each other, says Lightning: leave it out then.

    *every_n_steps*: optimiser steps (in a test: batches) from line to line.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self.terminal = sys.stderr.isatty()
        super().__init__(refresh_rate=1 if self.terminal else 0)  # 0: no bar
        self.every_n_steps = every_n_steps
        self._text = not self.terminal
        self._drawn = 0.0
        self._loss_sum: Tensor | None = None
        self._losses = 0
        self._line_at_step = 0
        self._began = (0.0, 0)  # time and step
        self._total_steps = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._text = not self.terminal and trainer.is_global_zero

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A validation that was cut short leaves its bar open.
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()

    # Text

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # type: ignore[override]
        super().on_train_start(trainer, pl_module)
        self._loss_sum, self._losses = None, 0
        self._line_at_step = trainer.global_step
        self._began = (time.monotonic(), trainer.global_step)
        self._total_steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._text:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # summed where it is: reading it would wait for the device
            whole = loss.detach() * trainer.accumulate_grad_batches  # Lightning hands out a part for each micro-batch
            self._loss_sum = whole if self._loss_sum is None else self._loss_sum + whole
            self._losses += 1
        if trainer.global_step - self._line_at_step >= self.every_n_steps:
            self._line_at_step = trainer.global_step
            log.info("%s", self._training_line(trainer))
            self._loss_sum, self._losses = None, 0

    def _training_line(self, trainer: pl.Trainer) -> str:
        total = "" if math.isinf(self._total_steps) else f"/{int(self._total_steps)}"
        parts = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}{total}"]
        if self._loss_sum is not None:
            parts.append(f"loss {float(self._loss_sum) / self._losses:.4g}")
        if trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}")
        monitor = next((c for c in trainer.callbacks if isinstance(c, Monitor)), None)  # type: ignore[attr-defined]
        if monitor is not None and monitor.examples_per_s is not None:
            parts.append(f"{monitor.examples_per_s:.3g} examples/s")
            parts.append(f"data wait {100 * (monitor.data_wait_share or 0.0):.0f}%")
        began, first = self._began
        if not math.isinf(self._total_steps):
            per_step = (time.monotonic() - began) / (trainer.global_step - first)
            parts.append(f"left {_duration((self._total_steps - trainer.global_step) * per_step)}")
        return "  ".join(parts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._text and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            # Counts, of special cases above all, are worth their place when there is something to count.
            values = [f"{name} {value:.4g}" for name, value in metrics.items() if "_num_" not in name or value]
            log.info("%s", "  ".join([f"epoch {trainer.current_epoch}", f"step {trainer.global_step}", *values]))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._text and (batch_idx + 1) % self.every_n_steps == 0:
            log.info("test %d/%s", batch_idx + 1, self.total_test_batches_current_dataloader)

    # Bar

    def init_train_tqdm(self) -> Tqdm:
        return self._bar(self.train_description, leave=True)

    def init_sanity_tqdm(self) -> Tqdm:
        return self._bar(self.sanity_check_description, leave=False)

    def init_validation_tqdm(self) -> Tqdm:
        inside_training = self.trainer.state.fn == "fit"
        return self._bar(self.validation_description, leave=not inside_training, position=int(inside_training))

    def init_test_tqdm(self) -> Tqdm:
        return self._bar(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Tqdm:
        return self._bar(self.predict_description, leave=True)

    def _bar(self, description: str, *, leave: bool, position: int = 0) -> Tqdm:
        """Lightning writes bars to stdout, which may well be a file when stderr is a terminal."""
        return Tqdm(
            desc=description,
            position=position,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _should_update(self, current: int, total: int | float | None) -> bool:
        # By the clock: showing the loss waits for the device, and fast steps need not all be shown.
        now = time.monotonic()
        if not self.is_enabled or (current != total and now - self._drawn < _REFRESH_S):
            return False
        self._drawn = now
        return True


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
