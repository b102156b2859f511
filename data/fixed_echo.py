"""Echo recordings that were made once and for all: real ones, or synthetic ones of others (AEC-Challenge).

Decisions that are not obvious
* Signals are given as they were recorded: no level is set, nothing is aligned. A recording is what a device heard. Only
  the clean signal is multiplied with the row's `clean_scale`, for corpora that keep it at another level.
* Far-end single talk without a clean file has silence for a target. What remains of real double talk nobody knows: its
  target is zeros, and `has_target` is False.
* Microphone, far end and clean signal are cut at the same samples, those that all of them have. Files that differ by
  more than 20 ms in length, or in sample rate, did not record the same moment on the same clock and are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from data.audio import audio_info, common_length, read_audio
from data.cache import RowReader
from data.echo_scenarios import SCENARIOS, collate_echo
from data.sampler import ItemKey, item_key
from data.stft_cache import SpectrumCache

ECHO_FILES = ("mic_filepath", "farend_filepath", "clean_filepath")
_UNKNOWN = -1  # delay, or moment at which the echo path changes
# Levels of the near end over echo and noise in dB, as far as the scenario tells them.
_RATIOS_DB = {
    "double_talk": (torch.nan, torch.nan),
    "far_end": (-torch.inf, -torch.inf),
    "near_end": (torch.inf, torch.nan),
}


def longest_delay_ms(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The longest delay that manifest rows with an echo state, in milliseconds; None if none does."""
    return max((row["delay_ms"] for row in rows if _has_echo(row) and "delay_ms" in row), default=None)


def common_samples(row: Mapping[str, Any]) -> tuple[int, int]:
    """Sample rate in Hz of a row's files, and samples that all of them have from the row's offset on.

    Raises:
        AudioError: a file cannot be opened, or they differ in sample rate or length.
    """
    recordings = []
    for path in (row[key] for key in ECHO_FILES if key in row):
        info = audio_info(path)
        start = round(row.get("offset", 0.0) * info.sample_rate)
        length = max(0, info.num_frames - start)
        if "offset" in row:
            length = min(length, round(row["duration"] * info.sample_rate))
        recordings.append((path, info.sample_rate, length))
    return recordings[0][1], common_length(recordings)


def read_part(
    row: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    sample_rate: int,
    num_samples: int | None,
    known: tuple[int, int] | None = None,
    readers: Mapping[str, Callable[[int, int], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """A random part of a row, the same of all its files, by their keys; all of it where it is shorter, or for None.

    *known*: what `common_samples` has said of the row, so that no file is opened twice. *readers*: for each key what
    gives so many samples from a sample on, in place of its file.

    Shape:
        Each `(T,)`, T <= num_samples.

    Raises:
        AudioError: a file cannot be read, or they differ in sample rate or length.
    """
    rate, num_frames = known or common_samples(row)
    available = max(1, num_frames * sample_rate // rate)
    count = available if num_samples is None else min(num_samples, available)
    start = int(rng.integers(available - count + 1))
    offset_s, duration_s = row.get("offset", 0.0) + start / sample_rate, count / sample_rate
    signals = {
        key: readers[key](start, count)
        if readers
        else read_audio(row[key], sample_rate=sample_rate, offset_s=offset_s, duration_s=duration_s)
        for key in ECHO_FILES
        if key in row
    }
    shortest = min(map(len, signals.values()))  # an offset between two samples may have cost one at the end
    return {key: signal[:shortest] for key, signal in signals.items()}


class FixedEchoDataset(Dataset):
    """Item `(index, epoch)`: row `index` of the manifest, whole, or a random crop of it, the same in all its files.

    The crop is drawn from `np.random.default_rng([seed, epoch, index])`. A row shorter than the segment is padded
    with zeros at the end, and `length` says how much of it is real.

    Args:
        rows: manifest rows of echo recordings, see `data.manifest`.
        sample_rate: rate of the signals in Hz.
        segment_s: length of a crop in seconds; None: whole recordings.
        seed: see above.
        spectra: keeps the spectra of whole recordings; None: an item has none.
        cache: keep what was decoded and resampled, see data/cache.py.

    Shape:
        An item is {"mic", "far", "target": float32 `(T,)`, "has_target": bool `()`, "length": int64 `()` samples,
        "scenario": int64 `()`, index in SCENARIOS, "delay_samples": float32 `()`, -1 where it is unknown or there is
        no echo, "path_change_sample": int64 `()`, always -1, "ser_db", "snr_db": float32 `()`, NaN where unknown, inf
        where there is no echo, -inf where there is no near end, "name": str}, and from `spectra` "mic_spectrum",
        "far_spectrum": float32 `(F, frames, 2)`.

    Raises:
        AudioError: from an item, when a file cannot be read, or its files differ in length or sample rate.
    """

    collate = staticmethod(collate_echo)

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        sample_rate: int,
        segment_s: float | None = None,
        seed: int = 0,
        spectra: SpectrumCache | None = None,
        cache: bool = False,
    ) -> None:
        if spectra is not None and segment_s is not None:
            raise ValueError("spectra are kept of whole recordings, not of crops: segment_s must be None")
        self.rows = rows
        self.spectra = spectra
        self.sample_rate = sample_rate
        self.num_samples = None if segment_s is None else round(segment_s * sample_rate)
        self.seed = seed
        self._samples: dict[int, tuple[int, int]] = {}  # of rows that were read before
        self._readers = {}
        if cache:  # a row without one of the files never asks for it
            for key in ECHO_FILES:
                files = [{**row, "audio_filepath": row.get(key, row["mic_filepath"])} for row in rows]
                self._readers[key] = RowReader(files, sample_rate=sample_rate, cache=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any]:
        index, epoch = item_key(key, len(self))
        row = self.rows[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        if index not in self._samples:
            self._samples[index] = common_samples(row)
        signals = read_part(
            row,
            rng,
            sample_rate=self.sample_rate,
            num_samples=self.num_samples,
            known=self._samples[index],
            readers={key: partial(_from, reader, index) for key, reader in self._readers.items()},
        )
        length = len(signals["mic_filepath"])
        if "clean_filepath" in signals:
            signals["clean_filepath"] = signals["clean_filepath"] * row.get("clean_scale", 1.0)
        missing = 0 if self.num_samples is None else self.num_samples - length
        silence = torch.zeros(length + missing)
        signals = {key: pad(signal, (0, missing)) for key, signal in signals.items()} if missing else signals
        mic, far, target = (signals.get(file, silence) for file in ECHO_FILES)
        scenario = row["scenario"]
        delay = row["delay_ms"] * self.sample_rate / 1000 if _has_echo(row) and "delay_ms" in row else _UNKNOWN
        ser_db, snr_db = _RATIOS_DB[scenario]
        spectra = {} if self.spectra is None else self.spectra.spectra(row, mic=mic, far=far)
        return {
            "mic": mic,
            "far": far,
            "target": target,
            **spectra,
            "has_target": torch.tensor("clean_filepath" in row or scenario == "far_end"),
            "length": torch.tensor(length),
            "scenario": torch.tensor(SCENARIOS.index(scenario)),
            "delay_samples": torch.tensor(float(delay)),
            "path_change_sample": torch.tensor(_UNKNOWN),
            "ser_db": torch.tensor(ser_db),
            "snr_db": torch.tensor(snr_db),
            "name": row.get("id") or Path(row["mic_filepath"]).stem,
        }


def _from(reader: RowReader, row: int, start: int, count: int) -> Tensor:
    return reader.read(row, start=start, count=count)


def _has_echo(row: Mapping[str, Any]) -> bool:
    return row["scenario"] != "near_end"
