"""Mixtures of talkers, made on the fly from recordings of single talkers.

Decisions that are not obvious
* Every training epoch draws new speakers, crops and levels; validation and test mixtures are those of epoch
  0 with a seed of their own, the same in every run, whatever the training seed is.
* `mixture` is the sum of `sources`, computed last: one common gain sets the level of both, nothing is
  clipped, and a mixture that would pass full scale is turned down as a whole. A loss that needs mixture =
  sum of sources holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.base import SystemData
from data.cache import RowReader, cached_mb
from data.errors import DataError
from data.sampler import ItemKey, item_key

_SILENCE_DB = -45.0  # RMS below which a crop holds hardly any speech: pauses lie near -60, speech near -25 dB
_TRIES = 4
_EMPTY_RMS = 1e-6  # below this a source is silence, which no gain may turn into noise


def mix(sources: Tensor, *, relative_db: Tensor, level_db: float) -> tuple[Tensor, Tensor]:
    """Set the levels of sources and add them up.

    Args:
        sources: one signal per talker, of any level.
        relative_db: RMS of the first source over that of each further one, in dB.
        level_db: RMS of the mixture, dB relative to full scale. Lower where it would pass full scale
            otherwise.

    Returns:
        Mixture and sources; the mixture is exactly `sources.sum(0)`.

    Shape:
        sources `(C, T)`, relative_db `(C - 1,)` -> `(T,)`, `(C, T)`.
    """
    rms = _rms(sources)  # (C,)
    wanted = torch.cat([torch.ones(1), 10 ** (-relative_db.float() / 20)])  # (C,)
    gains = torch.where(rms > _EMPTY_RMS, wanted / rms.clamp(min=_EMPTY_RMS), torch.zeros(()))
    sources = sources * gains[:, None]
    mixture = sources.sum(0)
    level = _rms(mixture)
    if level > _EMPTY_RMS:
        sources = sources * torch.minimum(10 ** (level_db / 20) / level, 1 / mixture.abs().max())
    return sources.sum(0), sources


class MixtureDataset(Dataset):
    """Item `(index, epoch)`: `num_sources` different speakers, a crop of each, random levels.

    Everything random is drawn from `np.random.default_rng([seed, epoch, index])`. A crop is drawn again, up
    to three times, when it is nearly silent; then the loudest is taken. A speaker's utterance that is
    shorter than the segment is continued with that speaker's next utterances.

    Args:
        rows: manifest rows with `audio_filepath`, `duration`, `speaker`.
        num_items: mixtures per epoch.
        num_sources: talkers per mixture.
        sample_rate: rate of the signals in Hz.
        segment_s: length in seconds.
        snr_db: range of the first talker's level over that of each other, dB.
        level_db: RMS of the mixture, dB relative to full scale.
        seed: see above.
        cache: keep decoded recordings in memory; "auto": when all of them take no more than `cache_limit_mb`.
        cache_limit_mb: see `cache`; each loader worker has a cache of its own.

    Shape:
        An item is {"mixture": float32 `(T,)`, "sources": float32 `(C, T)`, "length": int64 `()` samples}.

    Raises:
        DataError: too few speakers, or a row without speaker.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_items: int,
        num_sources: int = 2,
        sample_rate: int = 8000,
        segment_s: float = 3.0,
        snr_db: tuple[float, float] = (-5.0, 5.0),
        level_db: float = -25.0,
        seed: int = 0,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
    ) -> None:
        rows_of: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if not row.get("speaker"):
                raise DataError(f"{row['audio_filepath']}: its manifest row has no speaker, which mixing needs")
            rows_of.setdefault(row["speaker"], []).append(number)
        if len(rows_of) < num_sources:
            raise DataError(
                f"{len(rows_of)} speaker(s) in the manifest, mixtures of {num_sources} need as many:"
                f" the first row is {rows[0]['audio_filepath']}"
            )
        self.num_items = num_items
        self.num_sources = num_sources
        self.num_samples = round(segment_s * sample_rate)
        self.snr_db = snr_db
        self.level_db = level_db
        self.seed = seed
        self._rows_of = [rows_of[speaker] for speaker in sorted(rows_of)]
        if cache == "auto":
            cache = cached_mb(rows, sample_rate=sample_rate) <= cache_limit_mb
        self._audio = RowReader(rows, sample_rate=sample_rate, cache=bool(cache))

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, key: ItemKey | int) -> dict[str, Tensor]:
        index, epoch = item_key(key)
        if not 0 <= index < self.num_items:
            raise IndexError(f"item {index} of {self.num_items}")
        rng = np.random.default_rng([self.seed, epoch, index])
        speakers = rng.choice(len(self._rows_of), self.num_sources, replace=False)
        relative_db = torch.from_numpy(rng.uniform(*self.snr_db, self.num_sources - 1))
        sources = torch.stack([self._talk(rng, self._rows_of[speaker]) for speaker in speakers])  # (C, T)
        mixture, sources = mix(sources, relative_db=relative_db, level_db=self.level_db)
        return {"mixture": mixture, "sources": sources, "length": torch.tensor(self.num_samples)}

    @staticmethod
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack items; the mixture is added up in the batch's own order of summation, so that it stays exact.

        Shape:
            mixture `(B, T)`, sources `(B, C, T)`, length `(B,)`.
        """
        sources = torch.stack([item["sources"] for item in items])
        length = torch.stack([item["length"] for item in items])
        return {"mixture": sources.sum(1), "sources": sources, "length": length}

    def _talk(self, rng: np.random.Generator, rows: list[int]) -> Tensor:
        """A segment of one speaker that is not silent, if that can be had. `(T,)`"""
        best, best_rms = torch.zeros(self.num_samples), -1.0
        for _ in range(_TRIES):
            crop = self._crop(rng, rows)
            rms = float(_rms(crop))
            if rms > best_rms:
                best, best_rms = crop, rms
            if rms >= 10 ** (_SILENCE_DB / 20):
                break
        return best

    def _crop(self, rng: np.random.Generator, rows: list[int]) -> Tensor:
        """A random crop of a random utterance, continued with the next ones where it is too short. `(T,)`"""
        position = int(rng.integers(len(rows)))
        pieces, missing = [], self.num_samples
        while missing > 0:
            row = rows[position % len(rows)]
            available = self._audio.num_samples[row]
            count = min(available, missing)
            start = int(rng.integers(available - count + 1))
            piece = self._audio.read(row, start=start, count=count)
            pieces.append(piece)
            missing -= len(piece)
            position += 1
        return torch.cat(pieces)


class SeparationData(SystemData):
    """Data of the separation system: mixtures drawn from manifests of single talkers.

    Batch: {"mixture": `(B, T)`, "sources": `(B, C, T)`, "length": `(B,)`}, see `MixtureDataset`.

    Args:
        sample_rate: rate of all signals in Hz.
        num_sources: talkers per mixture.
        segment_s: length of a training mixture in seconds.
        eval_segment_s: length of a validation or test mixture in seconds.
        snr_db: [low, high], the range of level differences between talkers in dB.
        level_db: RMS of a mixture, dB relative to full scale.
        train_mixtures: mixtures per epoch.
        val_mixtures: validation mixtures; 0: no validation.
        test_mixtures: test mixtures.
        eval_seed: seed of the validation mixtures; the test mixtures have the next one.
        cache: true, false, or auto: on for a stage whose recordings take no more than `cache_limit_mb`.
        cache_limit_mb: see `cache`; counted per stage and per loader worker.
        Others: as `SystemData`.
    """

    def __init__(
        self,
        *,
        train_manifest: str | None = None,
        val_manifest: str | None = None,
        test_manifest: str | None = None,
        speech_dir: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        seed: int = 0,
        val_fixed: bool = True,
        loader: dict[str, Any] | None = None,
        sample_rate: int = 8000,
        num_sources: int = 2,
        segment_s: float = 3.0,
        eval_segment_s: float = 4.0,
        snr_db: Sequence[float] = (-5.0, 5.0),
        level_db: float = -25.0,
        train_mixtures: int = 2000,
        val_mixtures: int = 60,
        test_mixtures: int = 60,
        eval_seed: int = 5,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
    ) -> None:
        super().__init__(
            train_manifest=train_manifest,
            val_manifest=val_manifest,
            test_manifest=test_manifest,
            speech_dir=speech_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            val_fixed=val_fixed,
            loader=loader,
        )
        if num_sources < 2:
            raise ValueError(f"num_sources must be 2 or more, got {num_sources}")
        if sample_rate <= 0 or segment_s <= 0 or eval_segment_s <= 0:
            raise ValueError(
                f"sample_rate {sample_rate}, segment_s {segment_s}, eval_segment_s {eval_segment_s}: must be positive"
            )
        if len(snr_db) != 2 or snr_db[0] > snr_db[1]:
            raise ValueError(f"snr_db must be [low, high], got {list(snr_db)}")
        if train_mixtures < 1 or val_mixtures < 0 or test_mixtures < 0:
            raise ValueError(
                f"train_mixtures {train_mixtures} must be 1 or more, val_mixtures {val_mixtures} and"
                f" test_mixtures {test_mixtures} 0 or more"
            )
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache must be true, false or auto, got {cache!r}")
        self.num_mixtures = {"train": train_mixtures, "val": val_mixtures, "test": test_mixtures}
        self.segments_s = {"train": segment_s, "val": eval_segment_s, "test": eval_segment_s}
        self.seeds = {"train": seed, "val": eval_seed, "test": eval_seed + 1}
        self.mixing: dict[str, Any] = {
            "num_sources": num_sources,
            "sample_rate": sample_rate,
            "snr_db": (float(snr_db[0]), float(snr_db[1])),
            "level_db": level_db,
            "cache": cache,
            "cache_limit_mb": cache_limit_mb,
        }

    def has_data(self, stage: str) -> bool:
        return self.num_mixtures[stage] > 0 and super().has_data(stage)

    def dataset(self, stage: str) -> Dataset | None:
        rows = self.rows(stage)
        if rows is None:
            return None
        return MixtureDataset(
            rows,
            num_items=self.num_mixtures[stage],
            segment_s=self.segments_s[stage],
            seed=self.seeds[stage],
            **self.mixing,
        )


def _rms(signal: Tensor) -> Tensor:
    """Root mean square over the last axis."""
    return signal.square().mean(-1).sqrt()
