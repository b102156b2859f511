"""SIGTERM, SIGUSR1, Ctrl-C, and the end of the time that a run may take: finish the step, save, stop.

Decisions that are not obvious
* The loops are left with StopIteration, which is how Lightning's own loops end. `trainer.should_stop` would first run
  a whole validation, and does nothing before `min_epochs` and `min_steps` are met; any other exception would skip the
  teardown hooks, so that workers and log files stay open.
* The checkpoint is written at the end of the step, after all other callbacks saw it, and the loop goes on to its next
  hook, so that the step is also logged. From then on nothing is saved: the state no longer is that of a step.
* A validation in progress is cut short: its numbers would be of a part of the data, so they are dropped, and neither
  checkpoints nor schedules hear of it. callbacks/resume.py makes the resumed run repeat it. One in the middle of an
  accumulation window is finished instead, and the window too: its gradients are in no checkpoint.
* Launchers such as torchrun pass a signal on to processes that the sender may have signalled too. So the same request
  arrives twice within moments; only a later signal is a second one.
* Our handlers take the place of Lightning's. Its SIGTERM handler runs a collective from inside the handler, which
  hangs when every rank is told (scancel, docker stop), and under SLURM it would requeue the job by itself.
"""

import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from callbacks import clock
from callbacks.saving import save

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
_ECHO_S = 1.0


def duration_s(text: str) -> int:
    """The seconds that `DD:HH:MM:SS` stands for. Raises ValueError for anything else, and for none at all."""
    parts = re.fullmatch(r"(\d+):(\d\d?):(\d\d?):(\d\d?)", text) if isinstance(text, str) else None
    days, hours, minutes, seconds = map(int, parts.groups()) if parts else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0 or max(minutes, seconds) > 59 or hours > 23:
        raise ValueError(f"give days, hours, minutes and seconds as DD:HH:MM:SS, got {text!r}")
    return total


class GracefulStop(pl.Callback):
    """Turns the first signal into one complete last.ckpt and an orderly end of `trainer.fit`.

    If any rank was told, all ranks save and stop at the same step. A second signal raises KeyboardInterrupt at once,
    which Lightning turns into `sys.exit(1)`. The process's caller ends it with `128 + signum`.

    Attributes: `signum`, the signal that was received, 0 for none; `stopped`, whether training was cut short, by it or
    by *max_time* - it is not when the step was the last one anyway.

    *every_n_steps*: optimiser steps (in validation: batches) between the ranks asking one another. More than 1 saves
    a synchronisation per step on several GPUs and makes the reaction later.
    *max_time*: `DD:HH:MM:SS` since this process (or job of a sweep) started; a resumed run has it anew. null: no limit.

    Raises ValueError for values out of range.
    """

    def __init__(self, *, every_n_steps: int = 1, max_time: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps
        self.max_time = max_time
        try:
            self._max_time_s = math.inf if max_time is None else duration_s(max_time)
        except ValueError as error:
            raise ValueError(f"max_time: {error}") from error
        self.signum = 0
        self.stopped = False
        self._saved = False
        self._cut_validation = False
        self._asked_at_step = 0
        self._told_at = 0.0
        self._previous: dict[int, Any] = {}
        self._quiet = False

    # Signals

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Called by Lightning right before the loops; its handlers would replace ours, and in a test the caller's.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if stage != "fit":
            return
        self.signum, self.stopped, self._saved, self._cut_validation = 0, False, False, False
        self._quiet = trainer.global_rank != 0
        _run_last(self, trainer)
        if threading.current_thread() is not threading.main_thread():
            return  # Python installs handlers in the main thread only
        for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
            self._previous.setdefault(number, signal.signal(number, self._note))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            if time.monotonic() - self._told_at >= _ECHO_S:
                raise KeyboardInterrupt
            return
        self.signum, self._told_at = signum, time.monotonic()
        if not self._quiet:  # not print(): the signal may have interrupted one
            name = signal.Signals(signum).name
            os.write(2, f"{name}: stopping after this step; once more stops at once\n".encode())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._tidy_up(trainer)
        if stage == "fit" and trainer.world_size > 1:
            # A signal may have come to one process since the last step; all must agree whether a test follows.
            told = torch.tensor(self.signum, device=pl_module.device)
            self.signum = int(trainer.strategy.reduce(told, reduce_op="max"))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._tidy_up(trainer)  # Lightning calls no teardown hook after an exception

    def _tidy_up(self, trainer: pl.Trainer) -> None:
        vars(trainer).pop("save_checkpoint", None)
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:  # Lightning ignores Ctrl-C while it shuts down
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked_at_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Told between setup and the first step, or at the end of the epoch before.
        if self._anyone_told(trainer):
            self._save(trainer)
            self._leave(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stopped:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only after an optimiser step: accumulated gradients are in no checkpoint.
        if trainer.global_step - self._asked_at_step < self.every_n_steps:
            return
        self._asked_at_step = trainer.global_step
        if self._anyone_told(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Ends the fit loop before callbacks that monitor a metric look at half an epoch. Lightning calls those last.
        if self.stopped:
            self._leave(trainer)

    # Validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopped and not trainer.sanity_checking:
            self._leave(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit" or batch_idx % self.every_n_steps:
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():  # nothing to save before the window's end
            return
        if not self._anyone_told(trainer):
            return
        if not trainer.sanity_checking:  # before the first step there is nothing to save: on_train_epoch_start
            self._save(trainer)
            if not self.stopped:
                return
            self._cut_validation = True
            trainer._logger_connector.reset_results()  # what was logged so far is of a part of the data
        raise StopIteration  # leaves the loop over batches only

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cut_validation:
            self._leave(trainer)

    @staticmethod
    def _leave(trainer: pl.Trainer) -> NoReturn:
        """Out of the loop that called the hook; from a validation also out of the training epoch around it."""
        trainer.training = True  # as the training loop sets it after a validation
        trainer.save_checkpoint = lambda *args, **kwargs: None  # type: ignore[method-assign]
        raise StopIteration

    # Saving

    def _anyone_told(self, trainer: pl.Trainer) -> bool:
        if self._saved:
            return False
        told = bool(self.signum) or clock.wall_seconds() >= self._max_time_s
        return trainer.strategy.reduce_boolean_decision(told, all=False)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = True
        told = torch.tensor(self.signum, device=trainer.strategy.root_device)
        self.signum = int(trainer.strategy.reduce(told, reduce_op="max"))  # the same exit code on all ranks
        # After the very last step only its validation is left, which a resume could not repeat: let it finish.
        self.stopped = trainer.max_steps == -1 or trainer.global_step < trainer.max_steps
        if self.stopped:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved and not self.stopped:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        saved = save(trainer, path, may_stop=False)
        if trainer.is_global_zero:
            name = signal.Signals(self.signum).name if self.signum else f"max_time {self.max_time}"
            what = f"saved {path.relative_to(trainer.default_root_dir)}" if saved else "nothing could be saved"
            print(f"{name}: {what} at step {trainer.global_step}", flush=True)


def _run_last(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Put a callback behind all others but the checkpoint ones, which Lightning keeps at the end.

    What the others do at the end of a step, such as averaging weights, is then part of what it saves.
    """
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    first = next((i for i, other in enumerate(others) if isinstance(other, Checkpoint)), len(others))
    # A new list: Lightning is iterating over the old one.
    trainer.callbacks = [*others[:first], callback, *others[first:]]  # type: ignore[attr-defined]
