"""The processes of `trainer.strategy=ddp_spawn` and `ddp_fork`, which are no scripts of their own as those of ddp are.

They get the Trainer, train, and give weights, metrics and the path of the best checkpoint back to the process that
waits for them. What a script's process has besides is given to them here: log files, threads, quiet libraries. Signals
that come to the waiting process are passed on, and what a process was ended by is told as if it had happened here.
"""

import contextlib
import logging
import logging.config
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch.multiprocessing import ProcessRaisedException

from callbacks.graceful import GracefulStop
from launch.errors import is_known_fault, is_users_mistake
from launch.hardware import keep_freed_memory, quieten, share_cores
from launch.ranks import SIGNALS, leave_like_a_script
from launch.run_dir import log_name, rank

log = logging.getLogger(__name__)

_STEP, _STOPPED = "step_reached", "stopped_early"
_RAISED = re.compile(r"^(?:\w+\.)*(\w+): (.*)\Z", re.MULTILINE | re.DOTALL)  # the end of a traceback


class SpawnedProcess(pl.Callback):
    """Makes itself at home in a process that was started with the Trainer; nothing in the one that built it.

    *section*: of the Trainer. *cpu_threads*: see `share_cores`.
    """

    def __init__(self, *, section: dict[str, Any], cpu_threads: int | None) -> None:
        self._pid = os.getpid()
        self._section = {key: section[key] for key in ("accelerator", "devices")}
        self._cpu_threads = cpu_threads
        self._logging: Any = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if os.getpid() == self._pid:
            return
        self._pid = os.getpid()
        leave_like_a_script()
        if rank():
            for handler in self._logging.get("handlers", {}).values():
                if "filename" in handler:
                    path = Path(handler["filename"])
                    handler["filename"] = str(path.with_name(log_name(path.stem)))
                else:
                    handler["level"] = "WARNING"
        logging.config.dictConfig(self._logging)
        quieten()
        share_cores(self._section, self._cpu_threads)
        keep_freed_memory(self._section)
        log.info("rank %d of %d, with the Trainer of the process that waits", trainer.global_rank, trainer.world_size)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stopped = any(isinstance(c, GracefulStop) and c.stopped for c in trainer.callbacks)  # type: ignore[attr-defined]
        # Goes back to the process that waits.
        trainer.callback_metrics.update({_STEP: torch.tensor(trainer.global_step), _STOPPED: torch.tensor(stopped)})


@contextlib.contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Around `fit` and `test`, which may happen in processes that the Trainer's launcher starts by spawn or fork.

    Raises SystemExit with 128 + n when this process was told signal n, and what one of the others has raised.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _MultiProcessingLauncher):
        yield
        return
    told, waiting = [], os.getpid()

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != waiting:  # forked a moment ago, with nothing to save
            os._exit(128 + signum)
        told.append(signum)
        launcher.kill(signum)  # type: ignore[arg-type]

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if told:
            raise SystemExit(128 + told[0]) from error
        raise (_original(error) if isinstance(error, ProcessRaisedException) else error) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise SystemExit(128 + told[0])
    if (step := trainer.callback_metrics.pop(_STEP, None)) is not None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = int(step)  # where loggers go on with the test
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GracefulStop):
                callback.stopped = bool(trainer.callback_metrics.pop(_STOPPED))


def _original(error: ProcessRaisedException) -> Exception:
    """What another process has raised: of its text an error with that name, which is what launch/errors.py goes by."""
    text = str(error).strip()
    found = _RAISED.search(text[text.rfind("\n  File ") :])
    if found is None:
        return error
    name, message = found.groups()
    original = type(name, (RuntimeError,), {})(message)
    if not (is_users_mistake(original) or is_known_fault(original)):
        original.args = (f"{message}\n{text}",)
    return original
