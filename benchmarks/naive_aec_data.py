"""Examples of echo recordings as a first script loads them, to measure ours against (benchmarks/peers.py).

For each example three files are read whole and resampled by librosa, three crops are cut, and three STFTs computed:
nothing is kept from epoch to epoch. Used for nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import librosa
import numpy as np
import soundfile as sf
import torch
from torch import Tensor
from torch.utils.data import Dataset

FILES = {"mic": "mic_filepath", "far": "farend_filepath", "target": "clean_filepath"}


class NaiveEchoDataset(Dataset):
    """A row of *rows* as {"mic", "far", "target"}: (T,) at *sample_rate*; with *spectra* (F, frames, 2)."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, sample_rate: int, segment_s: float, spectra: bool) -> None:
        self.rows, self.sample_rate, self.spectra = rows, sample_rate, spectra
        self.samples = round(segment_s * sample_rate)
        self.window = torch.hann_window(320).sqrt()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        signals = {}
        for name, key in FILES.items():
            signal, rate = sf.read(self.rows[index][key], dtype="float32")
            signals[name] = librosa.resample(signal, orig_sr=rate, target_sr=self.sample_rate)
        start = np.random.randint(len(signals["mic"]) - self.samples + 1)
        crops = {name: torch.from_numpy(signal[start : start + self.samples]) for name, signal in signals.items()}
        return {name: self.spectrum(crop) for name, crop in crops.items()} if self.spectra else crops

    def spectrum(self, signal: Tensor) -> Tensor:
        return torch.view_as_real(torch.stft(signal, 320, 160, window=self.window, return_complex=True))
