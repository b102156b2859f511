"""Writing to a disk that may be full: checkpoints, which decide whether the run goes on, and small files beside them.

Only rank 0 writes. An error there alone would leave the others in the barrier behind the write, so the plugin that
writes (launch/checkpoint.py) notes its failure, and here all ranks hear of it and do the same.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl

from callbacks.failures import RunFailure

log = logging.getLogger("saving")

_told: set[Path] = set()  # files that could not be written the last time


class CannotSave(RunFailure):
    """A checkpoint could not be written, and the run is configured to stop then."""


def save(trainer: pl.Trainer, path: str | Path, *, weights_only: bool = False, may_stop: bool = True) -> bool:
    """Save a checkpoint on all ranks together; whether it was written. The file that was there stays if it was not.

    Raises CannotSave, on all ranks, where `exp_manager.on_full_disk` is `stop`; *may_stop* false: never.
    """
    trainer.save_checkpoint(path, weights_only)
    writer = trainer.strategy.checkpoint_io
    failure = trainer.strategy.broadcast(getattr(writer, "failure", None))
    if failure is None:
        return True
    writer.failure = None  # type: ignore[attr-defined]
    if may_stop and writer.stop_on_full_disk:  # type: ignore[attr-defined]
        raise CannotSave(
            f"{failure}; make room, exp_manager.resume_if_exists=true continues from the one before",
            told_elsewhere=not trainer.is_global_zero,
        )
    if trainer.is_global_zero:
        log.warning("%s", failure)
    return False


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; see `not_vital`."""
    with not_vital(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole, or raise OSError and leave the one that was there."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8", newline="")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def not_vital(path: Path) -> Iterator[None]:
    """That *path* cannot be written inside is no reason to stop: it is told once, until it could be written again."""
    try:
        yield
    except OSError as error:
        if path not in _told:
            _told.add(path)
            log.warning("%s cannot be written (%s), it is not up to date", path.name, error.strerror or error)
    else:
        _told.discard(path)
