"""Mixtures of talkers, made on the fly from recordings of single talkers.

Decisions that are not obvious
* Every training epoch draws new speakers, crops and levels; validation and test mixtures are those of epoch
  0 with a seed of their own, the same in every run, whatever the training seed is.
* An item may be several shorter mixtures in place of one (`pieces`). A batch then costs the same; with few steps to
  train for, many short mixtures teach more at first, and long ones teach later to keep talkers apart.
* What is drawn for augmentation comes from a random stream of its own: with and without it an item has the same
  speakers (as its first piece), and validation mixtures do not change when an option is added.
* Levels and the exact sum: data/levels.py.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import change_speed, draw_gains_db, speed_ratios
from data.cache import talk_and_noise
from data.crops import random_crop, speech_crop
from data.epochs import Setting, at_epoch
from data.errors import DataError
from data.levels import add_up, collate_mixtures, common_gain, gain_to, rms
from data.manifest import place_of
from data.sampler import ItemKey, item_key

_AUGMENTATION = 1  # the stream beside (seed, epoch, index); 0 would be the same as none


def mix(
    sources: Tensor,
    *,
    levels_db: Tensor,
    level_db: float | None,
    noise: Tensor | None = None,
    noise_snr_db: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Set the levels of sources and noise and add them up.

    Args:
        sources: one signal per talker, of any level.
        levels_db: RMS of the talkers relative to one another, in dB.
        level_db: RMS of the mixture, dB relative to full scale; None: the first talker keeps the level of its
            recording. Lower where it would pass full scale otherwise.
        noise: background, of any level.
        noise_snr_db: RMS of the sum of talkers over that of the noise, in dB.

    Returns:
        Mixture, sources and noise; the mixture is exactly their sum.

    Shape:
        sources `(C, T)`, levels_db `(C,)`, noise `(T,)` -> `(T,)`, `(C, T)`, `(T,)`.
    """
    kept = rms(sources[0]) if level_db is None else 1.0
    sources = sources * gain_to(kept * 10 ** (levels_db / 20), sources)[:, None]
    if noise is not None:
        noise = noise * gain_to(rms(sources.sum(0)) * 10 ** (-noise_snr_db / 20), noise)
    gain = common_gain(add_up(sources, noise), level_db=level_db)
    sources, noise = sources * gain, None if noise is None else noise * gain
    return add_up(sources, noise), sources, noise


class MixtureDataset(Dataset):
    """Item `(index, epoch)`: `num_sources` different speakers, a crop of each, random levels.

    Everything random is drawn from `np.random.default_rng([seed, epoch, index])`, augmentation from
    `[seed, epoch, index, 1]`. A crop is drawn again, up to three times, when it is nearly silent; then the loudest
    is taken. A speaker's utterance that is shorter than the segment is continued with that speaker's next utterances.

    Args:
        rows: manifest rows with `audio_filepath`, `duration`, `speaker`.
        num_items: mixtures per epoch.
        num_sources: talkers per mixture.
        sample_rate: rate of the signals in Hz.
        segment_s: length in seconds.
        pieces: an item is a list of so many mixtures that are as long together; by epoch as in data/epochs.py.
        snr_db: range of the first talker's level over that of each other, dB.
        level_db: RMS of the mixture, dB relative to full scale; None: as recorded, see `mix`.
        seed: see above.
        gain_db: a talker's level changes by up to that many dB,
        gain_p: with this probability.
        speed: factors of which each talker gets one, see data/augment.py.
        noise_rows: manifest rows with `audio_filepath`, `duration`, or None: no noise.
        noise_snr_db: range of the talkers' level over that of the noise, dB.
        noise_p: share of the mixtures with noise; in the others it is silence.
        cache: keep decoded recordings in memory; "auto": when all of them take no more than `cache_limit_mb`.
        cache_limit_mb: see `cache`; each loader worker has a cache of its own.

    Shape:
        An item is {"mixture": float32 `(T,)`, "sources": float32 `(C, T)`, "length": int64 `()` samples, "name": the
        speakers and the index}, with noise rows also "noise": float32 `(T,)`. With several pieces, a list of these.

    Raises:
        DataError: too few speakers, or a row without speaker. An item raises AudioError when a recording cannot be
            read.
    """

    collate = staticmethod(collate_mixtures)

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_items: int,
        num_sources: int = 2,
        sample_rate: int = 8000,
        segment_s: float = 3.0,
        pieces: Setting[int] = 1,
        snr_db: tuple[float, float] = (-5.0, 5.0),
        level_db: float | None = -25.0,
        seed: int = 0,
        gain_db: float = 0.0,
        gain_p: float = 0.0,
        speed: Sequence[float] = (1.0,),
        noise_rows: Sequence[Mapping[str, Any]] | None = None,
        noise_snr_db: tuple[float, float] = (5.0, 20.0),
        noise_p: float = 1.0,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
    ) -> None:
        rows_of: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if not row.get("speaker"):
                raise DataError(f"{place_of(row)}: its manifest row has no speaker, which mixing needs")
            rows_of.setdefault(row["speaker"], []).append(number)
        if len(rows_of) < num_sources:
            raise DataError(
                f"{len(rows_of)} speaker(s) in the manifest, mixtures of {num_sources} need as many:"
                f" the first row is {place_of(rows[0])}"
            )
        self.num_items = num_items
        self.num_sources = num_sources
        self.num_samples = round(segment_s * sample_rate)
        self.pieces = pieces
        self.snr_db = snr_db
        self.level_db = level_db
        self.seed = seed
        self.gain_db = gain_db
        self.gain_p = gain_p
        self.speeds = speed_ratios(speed)
        self.noise_snr_db = noise_snr_db
        self.noise_p = noise_p
        self._speakers = sorted(rows_of)
        self._rows_of = [rows_of[speaker] for speaker in self._speakers]
        self._talkers, self._noises = talk_and_noise(
            rows, noise_rows, sample_rate=sample_rate, cache=cache, cache_limit_mb=cache_limit_mb
        )

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any] | list[dict[str, Any]]:
        index, epoch = item_key(key, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        changes = np.random.default_rng([self.seed, epoch, index, _AUGMENTATION])
        pieces = at_epoch(self.pieces, epoch)
        items = [self._mixture(index, self.num_samples // pieces, rng, changes) for _ in range(pieces)]
        return items[0] if pieces == 1 else items

    def _mixture(
        self, index: int, num_samples: int, rng: np.random.Generator, changes: np.random.Generator
    ) -> dict[str, Any]:
        """A mixture drawn from `rng`, its augmentation from `changes`."""
        speakers = rng.choice(len(self._speakers), self.num_sources, replace=False)
        levels_db = np.append(0.0, -rng.uniform(*self.snr_db, self.num_sources - 1))
        levels_db += draw_gains_db(changes, self.num_sources, gain_db=self.gain_db, gain_p=self.gain_p)
        speeds = [self.speeds[number] for number in changes.integers(len(self.speeds), size=self.num_sources)]
        noise_snr_db = changes.uniform(*self.noise_snr_db)
        noise = None if self._noises is None else self._noise(changes, num_samples)
        talkers = zip(speakers, speeds, strict=True)
        sources = torch.stack([self._talk(rng, self._rows_of[s], speed, num_samples) for s, speed in talkers])  # (C, T)
        mixture, sources, noise = mix(
            sources,
            levels_db=torch.from_numpy(levels_db),
            level_db=self.level_db,
            noise=noise,
            noise_snr_db=noise_snr_db,
        )
        name = "_".join([*(self._speakers[speaker] for speaker in speakers), f"{index:06d}"])
        item = {"mixture": mixture, "sources": sources, "length": torch.tensor(num_samples), "name": name}
        return item if noise is None else item | {"noise": noise}

    def _talk(self, rng: np.random.Generator, rows: list[int], speed: Fraction, num_samples: int) -> Tensor:
        """A segment of one speaker that is not silent, if that can be had. `(num_samples,)`"""
        count = math.ceil(num_samples * speed)  # becomes num_samples or one more
        return change_speed(speech_crop(self._talkers, rng, rows, count), speed)[:num_samples]

    def _noise(self, changes: np.random.Generator, num_samples: int) -> Tensor:
        """A segment of noise, or silence. `(num_samples,)`"""
        assert self._noises is not None
        if changes.random() >= self.noise_p:
            return torch.zeros(num_samples)
        return random_crop(self._noises, changes, range(len(self._noises.num_samples)), num_samples)
