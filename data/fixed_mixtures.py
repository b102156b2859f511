"""Mixtures that were made once and for all, read from manifests of mixtures (LibriMix, wsj0-mix, one's own).

Decisions that are not obvious
* The mixture is not the stored file but the sum of its parts, after one common gain sets its level: so it is
  exact, where files are rounded to 16 bits each. What is left of the stored mixture beyond its sources is noise.
* Whether items have a noise is decided once per dataset, so that all batches look alike: yes if any row names a
  noise file, or if in one of the first rows the stored mixture differs from the sum of its sources by more than
  rounding. A row of such a dataset without noise file gets the difference.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from data.audio import read_audio
from data.errors import AudioError, DataError
from data.levels import add_up, collate_mixtures, common_gain, rms
from data.manifest import LINE_KEY, source_keys
from data.sampler import ItemKey, item_key

_REMAINDER = 1e-3  # -60 dB of the mixture, below which a remainder is no noise …
_ROUNDING = 1 / 32768  # … nor where it is below one step of 16 bits
_NUM_PROBED = 3  # rows that are asked whether they hold noise …
_MAX_PROBED = 20  # … and rows that are tried for it, as some may be unreadable
_PROBE_S = 10.0
_TOLERANCE_S = 0.001  # by which durations are rounded up, and by which the files of a row may differ in length


class FixedMixtureDataset(Dataset):
    """Item `(index, epoch)`: row `index` of the manifest, whole, or a random crop of it, the same in all its files.

    The crop is drawn from `np.random.default_rng([seed, epoch, index])`. A row shorter than the segment is padded
    with zeros at the end, and `length` says how much of it is real.

    Args:
        rows: manifest rows with `mix_filepath`, `s1_filepath`, …, `duration`.
        num_sources: talkers per mixture; every row must have as many.
        sample_rate: rate of the signals in Hz.
        segment_s: length of a crop in seconds; None: whole mixtures.
        level_db: RMS of the mixture, dB relative to full scale; None: as stored. Lower where it would pass full
            scale otherwise.
        seed: see above.

    Shape:
        An item is {"mixture": float32 `(T,)`, "sources": float32 `(C, T)`, "length": int64 `()` samples,
        "name": str}, and "noise": float32 `(T,)` in all items of a dataset or in none, see the head of this file.

    Raises:
        DataError: a row with another number of sources, or no row to be read at the beginning.
        AudioError: from an item, when its files cannot be read or differ in length.
    """

    collate = staticmethod(collate_mixtures)

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_sources: int,
        sample_rate: int = 8000,
        segment_s: float | None = None,
        level_db: float | None = -25.0,
        seed: int = 0,
    ) -> None:
        for row in rows:
            if len(source_keys(row)) != num_sources:
                raise DataError(
                    f"{row.get(LINE_KEY, row['mix_filepath'])}: {len(source_keys(row))} source(s),"
                    f" {num_sources} are needed (s1_filepath to s{num_sources}_filepath); set num_sources to fit"
                )
        self.rows = rows
        self.sample_rate = sample_rate
        self.num_samples = None if segment_s is None else round(segment_s * sample_rate)
        self.level_db = level_db
        self.seed = seed
        self._keys = [f"s{number}_filepath" for number in range(1, num_sources + 1)]
        self.has_noise = any("noise_filepath" in row for row in rows) or self._some_remainder()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any]:
        index, epoch = item_key(key, len(self))
        row = self.rows[index]
        start, count = self._crop(row, np.random.default_rng([self.seed, epoch, index]))
        sources, noise = self._read(row, start=start, count=count)
        gain = common_gain(add_up(sources, noise), level_db=self.level_db)
        length = sources.shape[-1]
        missing = 0 if self.num_samples is None else self.num_samples - length
        sources = pad(sources * gain, (0, missing))
        noise = None if noise is None else pad(noise * gain, (0, missing))
        return {
            "mixture": add_up(sources, noise),
            "sources": sources,
            **({} if noise is None else {"noise": noise}),
            "length": torch.tensor(length),
            "name": row.get("id") or Path(row["mix_filepath"]).stem,
        }

    def _crop(self, row: Mapping[str, Any], rng: np.random.Generator) -> tuple[int, int | None]:
        """First sample and number of samples to read; None: all."""
        if self.num_samples is None:
            return 0, round(row["duration"] * self.sample_rate) if "offset" in row else None
        available = max(1, int((row["duration"] - _TOLERANCE_S) * self.sample_rate))
        count = min(self.num_samples, available)
        return int(rng.integers(available - count + 1)), count

    def _read(self, row: Mapping[str, Any], *, start: int, count: int | None) -> tuple[Tensor, Tensor | None]:
        """Sources `(C, T)` and noise `(T,)` of a part of a row, as they are stored."""
        extra = [] if not self.has_noise else ["noise_filepath" if "noise_filepath" in row else "mix_filepath"]
        signals = self._read_files(row, [*self._keys, *extra], start=start, count=count)
        sources = torch.stack(signals[: len(self._keys)])
        if not extra:
            return sources, None
        return sources, signals[-1] if "noise_filepath" in row else signals[-1] - sources.sum(0)

    def _read_files(self, row: Mapping[str, Any], keys: list[str], *, start: int, count: int | None) -> list[Tensor]:
        """The same part of several files of a row, each `(T,)`."""
        offset_s = row.get("offset", 0.0) + start / self.sample_rate
        duration_s = None if count is None else count / self.sample_rate
        signals = [
            read_audio(row[key], sample_rate=self.sample_rate, offset_s=offset_s, duration_s=duration_s) for key in keys
        ]
        lengths = [len(signal) for signal in signals]
        shortest, longest = min(lengths), max(lengths)
        if longest - shortest > _TOLERANCE_S * self.sample_rate:
            raise AudioError(
                f"{row[keys[lengths.index(shortest)]]}: ends {(longest - shortest) / self.sample_rate:g} s before"
                f" {row[keys[lengths.index(longest)]]}; the files of a mixture must be equally long"
            )
        return [signal[:shortest] for signal in signals]

    def _some_remainder(self) -> bool:
        """Whether one of the first mixtures that can be read is more than the sum of its sources."""
        num_read, error = 0, None
        for row in self.rows[:_MAX_PROBED]:
            count = round(min(row["duration"], _PROBE_S) * self.sample_rate)
            try:
                mixture, *sources = self._read_files(row, ["mix_filepath", *self._keys], start=0, count=count)
            except AudioError as unreadable:
                error = error or unreadable
                continue
            if rms(mixture - torch.stack(sources).sum(0)) > max(_REMAINDER * float(rms(mixture)), _ROUNDING):
                return True
            num_read += 1
            if num_read == _NUM_PROBED:
                break
        if not num_read and error is not None:
            raise DataError(f"none of the first mixtures can be read: {error}")
        return False
