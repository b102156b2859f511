"""TensorBoard events on a disk that may be full."""

import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from callbacks.saving import not_vital


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger; events that cannot be written are dropped, told once, and end no run.

    TensorBoard's own writer would raise in its thread and again in the step that logs next, and leave half an event,
    behind which nothing is read.
    """

    @property
    def experiment(self) -> Any:
        begun = self._experiment is not None
        writer = super().experiment
        if not begun and self._experiment is not None:  # None: not the first process
            file = writer.file_writer.event_writer._general_file_writer
            file.write = _Appending(Path(os.fsdecode(file.filename)))
        return writer

    def save(self) -> None:
        path = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        with not_vital(path):
            try:
                super().save()
            except OSError:
                path.unlink(missing_ok=True)
                raise


class _Appending:
    """Appends events to a file, each whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, content: bytes) -> None:
        with not_vital(self.path):
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(content)
            except OSError:
                os.truncate(self.path, size)
                raise
