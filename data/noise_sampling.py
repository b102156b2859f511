"""A noise for each recording: a random part of a random file of a noise manifest, with NeMo's rules for retries.

Decisions that are not obvious
* A file that cannot be read is not fatal: another one is drawn, and the caller is told. When no draw succeeds there is
  no noise.
* A part that is silent is drawn again. NeMo tests whether the sum of the samples is above 0, which passes over half of
  the parts that are not silent (`nemo_compat`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.audio import audio_info, read_audio
from data.errors import AudioError

_MAX_FILES = 20  # NeMo's numbers, all of them
_MAX_PARTS = 100
_WHITE_NOISE_DB = (-90, -46)  # whole dB; the upper end is not drawn


class NoiseRecordings:
    """Noises of a manifest.

    Args:
        rows: manifest rows with `audio_filepath`, and `duration`, `offset` where given.
        sample_rate: rate of the noises in Hz.
        nemo_compat: NeMo's test of silence (see the head of this file).
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, sample_rate: int, nemo_compat: bool = False) -> None:
        self.rows = rows
        self.sample_rate = sample_rate
        self._is_heard = _sum_is_positive if nemo_compat else _any_sample

    def draw(self, rng: np.random.Generator, num_samples: int) -> tuple[Tensor, list[str]]:
        """A noise for `num_samples` samples, and a message for each bad file that was met.

        It is shorter than that where the file is, and white noise of -90 to -47 dB where the file is silent. After 20
        files that cannot be read it is silence.

        Shape: returns float32 `(N,)`, N <= num_samples.
        """
        messages: list[str] = []
        while self.rows and len(messages) < _MAX_FILES:
            row = self.rows[int(rng.integers(len(self.rows)))]
            try:
                noise = self._part(row, rng, num_samples)
            except AudioError as error:
                messages.append(str(error))
                continue
            if not self._is_heard(noise) and not noise.sum():
                level_db = int(rng.integers(*_WHITE_NOISE_DB))
                noise = noise + 10 ** (level_db / 20) * rng.standard_normal(len(noise), np.float32)
            return torch.from_numpy(noise), messages
        return torch.zeros(num_samples), messages

    def _part(self, row: Mapping[str, Any], rng: np.random.Generator, num_samples: int) -> np.ndarray:
        """A random part of a file, or all of one that is not longer. `(N,)`"""
        path, first_s = row["audio_filepath"], row.get("offset", 0.0)
        duration_s = row["duration"] if "duration" in row else audio_info(path).duration_s - first_s
        wanted_s = num_samples / self.sample_rate
        if duration_s <= wanted_s:
            return self._read(path, first_s, row.get("duration"))[:num_samples]
        for _ in range(_MAX_PARTS):
            noise = self._read(path, first_s + rng.uniform(0, duration_s - wanted_s), wanted_s)
            if self._is_heard(noise):
                break
        return noise

    def _read(self, path: str, offset_s: float, duration_s: float | None) -> np.ndarray:
        return read_audio(path, sample_rate=self.sample_rate, offset_s=offset_s, duration_s=duration_s).numpy()


def _any_sample(noise: np.ndarray) -> bool:
    return bool(noise.any())


def _sum_is_positive(noise: np.ndarray) -> bool:
    """The sum one sample after the other in float32, as Python's `sum` adds them up."""
    return bool(noise.size and np.cumsum(noise, dtype=np.float32)[-1] > 0)
