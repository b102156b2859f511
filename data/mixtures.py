"""Data of the separation system: mixtures drawn from single talkers, or mixtures that were made once and for all.

A manifest of talkers (rows with `audio_filepath`, `speaker`) is mixed on the fly, one of mixtures (`mix_filepath`,
`s1_filepath`, …) is read as it is; each of train, val and test may be either.
"""

import logging
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from data.augment import speed_ratios
from data.base import SystemData
from data.checks import number, whole_number
from data.dynamic_mixtures import MixtureDataset
from data.epochs import Setting, values_of
from data.errors import DataError
from data.fixed_mixtures import FixedMixtureDataset
from data.manifest import TALKER_KEYS, is_echo, is_mixture

log = logging.getLogger(__name__)

_MAX_SOURCES = 8  # what the permutation-invariant loss is made for


class SeparationData(SystemData):
    """Data of the separation system.

    Batch: {"mixture": `(B, T)`, "sources": `(B, C, T)`, "length": `(B,)` samples, "name": list of B}, with noise also
    "noise": `(B, T)`; see `MixtureDataset` and `FixedMixtureDataset`. `mixture == sources.sum(1)` (`+ noise`) exactly.

    Args:
        sample_rate: rate of all signals in Hz.
        num_sources: talkers per mixture, 1 to 8. One is for noisy speech: noise is all there is to take away.
        segment_s: length of a training mixture in seconds.
        eval_segment_s: length of a validation or test mixture in seconds; fixed mixtures are taken whole.
        level_db: RMS of a mixture, dB relative to full scale; None: as recorded.
        eval_seed: seed of the validation mixtures; the test mixtures have the next one.

        Of mixtures of single talkers only:
        pieces: in training, shorter mixtures in place of one of `segment_s`, see `MixtureDataset`.
        snr_db: [low, high], the range of level differences between talkers in dB.
        gain_db: in training, a talker's level changes by up to that many dB,
        gain_p: with this probability.
        speed: in training, factors of which each talker gets one.
        noise_manifest: recordings of noise for training; None: no noise.
        val_noise_manifest: the same for validation.
        test_noise_manifest: the same for the test.
        noise_snr_db: [low, high], the range of the talkers' level over the noise in dB.
        noise_p: in training, the share of mixtures with noise.
        train_mixtures: mixtures per epoch.
        val_mixtures: validation mixtures; 0: no validation, of any kind.
        test_mixtures: test mixtures; 0: no test.
        cache: true, false, or auto: on for a stage whose recordings take no more than `cache_limit_mb`.
        cache_limit_mb: see `cache`; counted per stage and per loader worker.

        Others: as `SystemData`.
    """

    LENGTH_KEY = "segment_s"

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
        max_bad_files: int = 10,
        max_bad_fraction: float = 0.01,
        loader: dict[str, Any] | None = None,
        sample_rate: int = 8000,
        num_sources: int = 2,
        segment_s: float = 3.0,
        eval_segment_s: float = 4.0,
        level_db: float | None = -25.0,
        eval_seed: int = 5,
        pieces: Setting[int] = 1,
        snr_db: Sequence[float] = (-5.0, 5.0),
        gain_db: float = 3.0,
        gain_p: float = 0.5,
        speed: Sequence[float] = (1.0,),
        noise_manifest: str | None = None,
        val_noise_manifest: str | None = None,
        test_noise_manifest: str | None = None,
        noise_snr_db: Sequence[float] = (5.0, 20.0),
        noise_p: float = 1.0,
        train_mixtures: int = 2000,
        val_mixtures: int = 60,
        test_mixtures: int = 60,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
    ) -> None:
        super().__init__(
            train_manifest=train_manifest,
            val_manifest=val_manifest,
            test_manifest=test_manifest,
            folder=speech_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            max_bad_files=max_bad_files,
            max_bad_fraction=max_bad_fraction,
            loader=loader,
        )
        if whole_number("num_sources", num_sources, least=1) > _MAX_SOURCES:
            raise ValueError(f"num_sources must be 1 to {_MAX_SOURCES}, got {num_sources}")
        least_s = 1 / whole_number("sample_rate", sample_rate, least=1)  # one sample
        segment_s = number("segment_s", segment_s, least=least_s)
        for piece in values_of("pieces", pieces):
            if whole_number("pieces", piece, least=1) > segment_s * sample_rate:
                raise ValueError(f"pieces must not be more than a segment has samples, got {piece}")
        gain_db = number("gain_db", gain_db, least=0)
        gain_p = number("gain_p", gain_p, least=0, most=1)
        noise_p = number("noise_p", noise_p, least=0, most=1)
        self.num_mixtures = {
            "train": whole_number("train_mixtures", train_mixtures, least=1),
            "val": whole_number("val_mixtures", val_mixtures, least=0),
            "test": whole_number("test_mixtures", test_mixtures, least=0),
        }
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache must be true, false or auto, got {cache!r}")
        speed_ratios(speed)  # refuses bad values here, not when training starts
        eval_segment_s = number("eval_segment_s", eval_segment_s, least=least_s)
        self.segments_s = {"train": segment_s, "val": eval_segment_s, "test": eval_segment_s}
        eval_seed = whole_number("eval_seed", eval_seed, least=0)
        self.seeds = {"train": seed, "val": eval_seed, "test": eval_seed + 1}
        self.noise_manifests = {
            "train": noise_manifest,
            "val": val_noise_manifest,
            "test": test_noise_manifest,
        }
        self.common: dict[str, Any] = {"num_sources": num_sources, "sample_rate": sample_rate, "level_db": level_db}
        self.mixing: dict[str, Any] = {
            "snr_db": _interval("snr_db", snr_db),
            "noise_snr_db": _interval("noise_snr_db", noise_snr_db),
            "cache": cache,
            "cache_limit_mb": cache_limit_mb,
        }
        self.augmentation: dict[str, Any] = {
            "pieces": pieces,
            "gain_db": gain_db,
            "gain_p": gain_p,
            "speed": speed,
            "noise_p": noise_p,
        }

    def has_data(self, stage: str) -> bool:
        return self.num_mixtures[stage] > 0 and super().has_data(stage)

    def dataset(self, stage: str) -> Dataset | None:
        rows = self.rows(stage)
        if rows is None:
            return None
        training, noise_manifest = stage == "train", self.noise_manifests[stage]
        common = self.common | {"seed": self.seeds[stage]}
        if is_echo(rows[0]):
            raise DataError(
                f"{self.manifests[stage]}: holds echo recordings (mic_filepath), which are not for separation; it"
                " needs rows with audio_filepath or with mix_filepath, s1_filepath, …"
            )
        if not is_mixture(rows[0]):
            return MixtureDataset(
                rows,
                num_items=self.num_mixtures[stage],
                segment_s=self.segments_s[stage],
                noise_rows=None if noise_manifest is None else self.read_rows(noise_manifest, required=TALKER_KEYS),
                **common,
                **self.mixing,
                **(self.augmentation if training else {}),
            )
        if noise_manifest is not None:
            key = "noise_manifest" if training else f"{stage}_noise_manifest"
            raise DataError(
                f"data.{key}={noise_manifest}: the mixtures of {self.manifests[stage]} are fixed, their noise stands"
                " in their own rows (noise_filepath); set it to null"
            )
        if training:
            log.info("the training mixtures are fixed: data.snr_db, gain_db, speed and train_mixtures have no effect")
        return FixedMixtureDataset(rows, segment_s=self.segments_s[stage] if training else None, **common)


def _interval(name: str, value: Sequence[float]) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not value[0] <= value[1]:
        raise ValueError(f"{name} must be [low, high], got {value!r}")
    return float(value[0]), float(value[1])
