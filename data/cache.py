"""Recordings kept in memory: a compressed file is decoded and resampled once, not for every crop.

Kept as 16-bit integers, half the size of floats. A 16-bit recording that needs no resampling comes back bit
for bit; any other is rounded to 16 bits (about -98 dB). A recording with levels above 1 is kept with a
scale of its own, so it is not clipped. Each process (each loader worker) fills a cache of its own, when a
recording is first asked for; that one cannot be read is remembered too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.audio import FULL_SCALE, read_audio
from data.errors import AudioError


def fits(
    rows: Sequence[Mapping[str, Any]],
    *,
    sample_rate: int,
    cache: bool | str,
    cache_limit_mb: float,
    files: Sequence[str] = ("audio_filepath",),
) -> bool:
    """Whether the recordings of rows are to be kept: *cache* is true, or "auto" and all together take no more than the
    limit in MiB (2**20 bytes) at `sample_rate` Hz. *files*: the keys that name a row's recordings.
    """
    seconds = sum(row["duration"] * sum(file in row for file in files) for row in rows)
    return bool(cache) if cache != "auto" else seconds * sample_rate * 2 / 2**20 <= cache_limit_mb


class RowReader:
    """Crops of manifest rows as mono audio at one rate.

    Args:
        rows: manifest rows; one with `offset` is a part of a longer file.
        sample_rate: rate of the result in Hz.
        cache: keep what was decoded.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, sample_rate: int, cache: bool) -> None:
        self.sample_rate = sample_rate
        self.cache = cache
        # The millisecond allows for durations that a manifest rounds up.
        self.num_samples = [max(1, int((row["duration"] - 0.001) * sample_rate)) for row in rows]
        """Samples of each row that a crop can rely on."""
        self._parts = [
            (row["audio_filepath"], row.get("offset", 0.0), row["duration"] if "offset" in row else None)
            for row in rows
        ]
        self._kept: dict[int, tuple[Tensor, float] | str] = {}  # integers and scale, or why there are none

    def read(self, row: int, *, start: int, count: int) -> Tensor:
        """`count` samples of row number `row` from sample `start` on, fewer if the recording ends before.

        Shape:
            Returns float32 `(T,)`, T <= count.

        Raises:
            AudioError: the recording cannot be read, or ends before `start`.
        """
        path, offset_s, duration_s = self._parts[row]
        if not self.cache:
            return read_audio(
                path,
                sample_rate=self.sample_rate,
                offset_s=offset_s + start / self.sample_rate,
                duration_s=count / self.sample_rate,
            )
        if row not in self._kept:
            try:
                whole = read_audio(path, sample_rate=self.sample_rate, offset_s=offset_s, duration_s=duration_s)
                self._kept[row] = _to_int16(whole)
            except AudioError as error:
                self._kept[row] = str(error)
        kept = self._kept[row]
        if isinstance(kept, str):
            raise AudioError(kept)
        kept, scale = kept
        if start >= len(kept):
            raise AudioError(f"{path}: shorter ({len(kept) / self.sample_rate:g} s) than its manifest says")
        return kept[start : start + count].float() * scale

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker gets: everything but the recordings, which it decodes when it needs them."""
        return self.__dict__ | {"_kept": {}}


def _to_int16(samples: Tensor) -> tuple[Tensor, float]:
    """Integers and the scale that turns them back."""
    peak = float(samples.abs().max())
    scale = 1 / FULL_SCALE if peak <= 1 else peak / (FULL_SCALE - 1)
    return (samples / scale).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16), scale


def talk_and_noise(
    rows: Sequence[Mapping[str, Any]],
    noise_rows: Sequence[Mapping[str, Any]] | None,
    *,
    sample_rate: int,
    cache: bool | str,
    cache_limit_mb: float,
) -> tuple[RowReader, RowReader | None]:
    """Readers of the recordings that a dataset is made from; None where there is no noise.

    *cache*: true, false, or "auto": when all of them together take no more than *cache_limit_mb*.
    """
    all_rows = [*rows, *(noise_rows or ())]
    cache = fits(all_rows, sample_rate=sample_rate, cache=cache, cache_limit_mb=cache_limit_mb)
    talkers = RowReader(rows, sample_rate=sample_rate, cache=cache)
    return talkers, RowReader(noise_rows, sample_rate=sample_rate, cache=cache) if noise_rows else None
