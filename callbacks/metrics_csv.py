"""metrics.csv: every logged scalar as one wide table, a row per step.

Lightning's CSVLogger deletes the file of the run that is resumed, writes only every hundred calls, and gives each call
a row of its own.
"""

import contextlib
import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.saving import not_vital, replace_text

_KEYS = ("epoch", "step")


class MetricsCsv(Logger):
    """Writes `<directory>/metrics.csv` with the columns epoch, step and one per metric, in order of appearance.

    What is logged for one step goes into one row. The file is complete after every call; rows that a full disk does not
    take are missing, which is told once. An existing file goes on:
    rows from the resumed step on are dropped (`continue_from`, or else the first step that is logged decides), since
    the run that wrote them went further than its checkpoint.

    *directory*: made when the first metric arrives, on rank 0 only.
    """

    def __init__(self, *, directory: str | Path) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._columns: list[str] | None = None  # None: the file has not been looked at yet
        self._row: dict[str, Any] = {}
        self._row_offset = 0  # where in the file the current row begins

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the configuration."""

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows before `step`, drop the others."""
        with not_vital(self.path), self._anew_after_an_error():
            self._continue_from(step)

    def _continue_from(self, step: int) -> None:
        rows, columns = _read(self.path)
        kept = [row for row in rows if int(row["step"]) < step]
        self._columns = columns
        self._rewrite(kept)
        # The last row is still open: a validation that the resumed run repeats belongs to its step.
        last = {name: value for name, value in kept[-1].items() if value} if kept else {}
        self._row = {**last, "step": int(last["step"])} if last else {}
        self._row_offset = self.path.stat().st_size - len(_lines([last], columns).encode() if last else b"")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = int(step or 0)
        with not_vital(self.path), self._anew_after_an_error():
            if self._columns is None:
                self._continue_from(step)
            self._log(metrics, step)

    @contextlib.contextmanager
    def _anew_after_an_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._columns = None  # the file is looked at again with the next row
            raise

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        assert self._columns is not None
        if self._row.get("step") != step:
            self._row = {"step": step}
            self._row_offset = self.path.stat().st_size
        self._row |= {name: _plain(value) for name, value in metrics.items() if name != "step"}
        if new := [name for name in self._row if name not in self._columns]:
            rows, _ = _read(self.path, self._row_offset)
            self._columns += new
            self._rewrite(rows)
            self._row_offset = self.path.stat().st_size
        try:
            with self.path.open("r+b") as file:
                file.seek(self._row_offset)
                file.write(_lines([self._row], self._columns).encode())
                file.truncate()
        except OSError:
            os.truncate(self.path, self._row_offset)  # half a row may look like a whole one
            raise

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        assert self._columns is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = _lines([dict(zip(self._columns, self._columns, strict=True))], self._columns)
        replace_text(self.path, header + _lines(rows, self._columns))


def _read(path: Path, size: int | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and columns of the first `size` bytes; a row that was cut off by a crash is left out."""
    text = path.read_bytes()[:size].decode("utf-8", errors="replace") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    columns = list(reader.fieldnames or _KEYS)
    if not set(_KEYS) <= set(columns):
        raise ValueError(f"{path}: not a table of ours (no column epoch or step); move it away")
    return [row for row in reader if (row["step"] or "").isdigit() and None not in row], columns


def _lines(rows: list[dict[str, Any]], columns: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    # Nine digits tell all float32 values apart.
    return value if isinstance(value, int) else float(f"{float(value):.9g}")
