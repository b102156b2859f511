"""Echoes that devices recorded, as parts of examples that are made: far-end single talk, with its far end.

A simulation knows no driver that reorders buffers and no loudspeaker that rattles. Microphone and far end are cut at
the same place, so their delay, which nobody knows, is the device's own. What the microphone heard beside the echo (its
noise) counts as echo.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from data.crops import not_silent
from data.errors import DataError
from data.fixed_echo import read_part
from data.levels import rms
from data.manifest import is_echo, place_of


class RecordedEcho(NamedTuple):
    """A far end and its echo, float32 `(T,)` each, at the levels of the recording, and the recording's name."""

    far: np.ndarray
    echo: np.ndarray
    name: str


class RecordedEchoes:
    """Random parts of recordings of far-end single talk.

    Args:
        rows: manifest rows with `mic_filepath`, `farend_filepath` and the scenario far_end.
        sample_rate: rate of the signals in Hz.

    Raises:
        DataError: a row of another kind or scenario.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, sample_rate: int) -> None:
        for row in rows:
            if not is_echo(row):
                raise DataError(f"{place_of(row)}: no recorded echo; a row needs mic_filepath and farend_filepath")
            if row["scenario"] != "far_end":
                raise DataError(
                    f"{place_of(row)}: is {row['scenario']}; recorded echoes are far-end single talk (far_end), such as"
                    " data.prepare aec_challenge writes to *_far_end.jsonl"
                )
        self.rows = [{key: value for key, value in row.items() if key != "clean_filepath"} for row in rows]
        self.sample_rate = sample_rate

    def draw(self, rng: np.random.Generator, num_samples: int) -> RecordedEcho:
        """A part in which the far end is not silent, where that can be had; a short recording ends in silence.

        Raises:
            AudioError: a recording cannot be read, or its files differ in length or sample rate.
        """
        row = self.rows[int(rng.integers(len(self.rows)))]

        def part() -> torch.Tensor:
            signals = read_part(row, rng, sample_rate=self.sample_rate, num_samples=num_samples)
            pair = torch.stack([signals["farend_filepath"], signals["mic_filepath"]])  # (2, T)
            return pad(pair, (0, num_samples - pair.shape[-1]))

        far, echo = not_silent(part, level=lambda pair: float(rms(pair[0]))).numpy()
        return RecordedEcho(far, echo, row.get("id") or Path(row["mic_filepath"]).stem)
