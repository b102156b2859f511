"""Spectra of recordings that are read whole, kept in a folder: computed once for all epochs, runs and processes.

A file is named after all that its spectra depend on: the recordings with their sizes and times of change, the part
that is read, the sample rate, the transform and the version of torch. So nothing is ever out of date; what is no longer
asked for stays, and the folder can be removed at any time. The spectra are those that the system would compute on a
CPU, bit for bit.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.audio import PathLike, atomic_path
from data.errors import AudioError, DataError
from data.manifest import path_keys
from modules.stft import PRESETS, STFT

SPECTRA = ("mic_spectrum", "far_spectrum")


class SpectrumCache:
    """Spectra of microphone and far end of whole recordings.

    Args:
        folder: where they are kept; made if it is not there.
        preset: a name of `modules.stft.PRESETS`.
        window: a name of `modules.stft.WINDOWS`.
        sample_rate: of the signals in Hz.

    Raises:
        DataError: the folder cannot be made.
        ValueError: no such preset or window.
    """

    def __init__(self, folder: PathLike, *, preset: str, window: str, sample_rate: int) -> None:
        if preset not in PRESETS:
            raise ValueError(f"data.stft={preset}: no such preset; choose from {', '.join(PRESETS)}")
        _, n_fft, hop_samples = PRESETS[preset]
        self.stft = STFT(n_fft=n_fft, hop_samples=hop_samples, window=window)
        self.folder = Path(os.path.abspath(folder))
        self._depends = [sample_rate, n_fft, hop_samples, window, torch.__version__]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.stft_cache={folder}: cannot be made ({error.strerror})") from error

    def spectra(self, row: Mapping[str, Any], *, mic: Tensor, far: Tensor) -> dict[str, Tensor]:
        """`mic_spectrum` and `far_spectrum` of a row whose signals are these, padded to whole hops.

        Shape:
            `(T,)`, `(T,)` -> `(F, frames, 2)` each, frames = ceil(T / hop_samples) + 1.

        Raises:
            AudioError: a recording is gone.
            DataError: a file of the folder is damaged, or cannot be written.
        """
        path = self.folder / f"{self._key(row)}.npy"
        try:
            kept = np.load(path) if path.exists() else None
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path}: no spectra can be read from it ({error}); remove it") from error
        if kept is None:
            kept = self.stft(self.stft.whole_hops(torch.stack([mic, far]))).numpy()  # (2, F, frames, 2)
            try:
                with atomic_path(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, kept)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be written ({error.strerror}); make room or set data.stft_cache=null"
                ) from error
        return dict(zip(SPECTRA, torch.from_numpy(kept), strict=True))

    def _key(self, row: Mapping[str, Any]) -> str:
        files = []
        for key in path_keys(row):
            try:
                state = os.stat(row[key])
            except OSError as error:
                raise AudioError(f"{row[key]}: cannot be opened ({error.strerror})") from error
            files.append([key, row[key], state.st_size, state.st_mtime_ns])
        part = [row.get("offset"), row["duration"] if "offset" in row else None]
        return hashlib.sha256(json.dumps([files, part, self._depends]).encode()).hexdigest()[:32]
