"""A callback for tests: stops a run at a named moment and leaves a file that says so, until somebody kills it.

`MOMENT` is `<place>:<number>`: from the number-th optimiser step of this process on, at the place. Without it the
callback does nothing, so that the run left alone may have it too.
"""

import io
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import callbacks.low_rank as low_rank

WRITE, VALIDATION, BEFORE_SWITCH, IN_SWITCH = "write", "validation", "before_switch", "in_switch"
MARK = Path("moment")
_PATIENCE_S = 20.0
_PLACE, _, _NUMBER = os.environ.get("MOMENT", "").partition(":")
_save, _switch_layers = torch.save, low_rank.switch_layers


class Moments(pl.Callback):
    """Counts the steps of this process."""

    steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and _PLACE:
            torch.save = _save_in_two_parts
            low_rank.switch_layers = _switch_later

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        Moments.steps = self.steps + (not trainer.fit_loop.epoch_loop._should_accumulate())

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            _wait(VALIDATION)

    def layers_replaced(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            _wait(IN_SWITCH)


def _wait(place: str) -> None:
    if place == _PLACE and Moments.steps >= int(_NUMBER):
        MARK.write_text(place)
        time.sleep(_PATIENCE_S)
        raise TimeoutError(f"nobody killed this process in: {place}")


def _save_in_two_parts(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    if not str(getattr(file, "name", "")).endswith(".ckpt.tmp"):
        return _save(content, file, *args, **kwargs)
    memory = io.BytesIO()
    _save(content, memory, *args, **kwargs)
    data = memory.getvalue()
    file.write(data[: len(data) // 2])
    file.flush()
    _wait(WRITE)
    file.write(data[len(data) // 2 :])


def _switch_later(*args: Any, **kwargs: Any) -> Any:
    _wait(BEFORE_SWITCH)
    return _switch_layers(*args, **kwargs)
