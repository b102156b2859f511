"""Copies of recordings at one sample rate, made once: mono WAV of 16 bits, which a crop is read from fastest.

What passes full scale (resampling rings where a recording clipped) is neither clipped nor made quieter, which would
change the ratio of a microphone to its clean signal: such a copy has 32-bit floats. The last line on stdout counts
them. A copy appears whole or not at all, and one that is not older than its recording is kept: a making that was
interrupted goes on where it was.
"""

import os
import time
from pathlib import Path
from typing import Any

from data.audio import PathLike, read_audio, write_audio
from data.errors import AudioError
from data.folders import leave_out_bad
from data.manifest import path_keys

Row = dict[str, Any]

_PROGRESS_S = 10.0


def convert_manifests(
    manifests: dict[str, list[Row]], *, root: PathLike, folder: PathLike, sample_rate: int
) -> dict[str, list[Row]]:
    """Copy the recordings of all rows into `folder`, and give the rows that name the copies.

    Args:
        manifests: rows with absolute paths below `root`.
        root: <root>/a/b.wav becomes <folder>/<name of root>/a/b.wav.
        folder: where the copies go.
        sample_rate: theirs in Hz.

    Raises:
        DataError: more than max(10, 1 %) of a manifest's recordings cannot be read; fewer are left out with a warning.
        OSError: a copy cannot be written.
    """
    top, target = Path(os.path.abspath(root)), Path(os.path.abspath(folder))
    paths = {row[key] for rows in manifests.values() for row in rows for key in path_keys(row)}
    made = _Copies(top, target / top.name, sample_rate=sample_rate, num_files=len(paths))

    def converted(row: Row) -> Row:
        return row | {key: made.copy_of(row[key]) for key in path_keys(row)}

    rows = {name: leave_out_bad(rows, converted, where=name) for name, rows in manifests.items()}
    made.report()
    return rows


class _Copies:
    """The copies, each made when it is first asked for."""

    def __init__(self, root: Path, folder: Path, *, sample_rate: int, num_files: int) -> None:
        self.root, self.folder = root, folder
        self.sample_rate = sample_rate
        self.num_files = num_files
        self.num_kept = self.num_floats = 0
        self._copies: dict[str, str | AudioError] = {}
        self._told_s = time.monotonic()

    def copy_of(self, path: str) -> str:
        """The copy's path. Raises AudioError when the recording cannot be read, OSError when it cannot be written."""
        if path not in self._copies:
            self._copies[path] = self._made(Path(path))
            if time.monotonic() - self._told_s > _PROGRESS_S:
                self.report()
        copy = self._copies[path]
        if isinstance(copy, AudioError):
            raise copy
        return copy

    def _made(self, path: Path) -> str | AudioError:
        copy = (self.folder / path.relative_to(self.root)).with_suffix(".wav")
        if copy.exists() and copy.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            self.num_kept += 1
            return str(copy)
        try:
            samples = read_audio(path, sample_rate=self.sample_rate)
        except AudioError as error:
            return error
        try:
            self.num_floats += write_audio(copy, samples, self.sample_rate, sixteen_bits=True)
        except AudioError as error:  # a full disk is no reason to leave a recording out
            raise OSError(str(error)) from error
        return str(copy)

    def report(self) -> None:
        self._told_s = time.monotonic()
        floats = f", {self.num_floats} pass full scale and are 32-bit floats" if self.num_floats else ""
        kept = f", {self.num_kept} of them were there" if self.num_kept else ""
        print(f"{self.folder}: {len(self._copies)} of {self.num_files} files{kept}{floats}", flush=True)
