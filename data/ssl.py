"""Data of self-supervised pre-training: clean speech, and the same with noise or other talkers added (NEST).

Decisions that are not obvious
* All randomness of an item comes from (seed, epoch, index), that of evaluation from fixed seeds: validation has the
  same noise and the same masks each time, in every run. NeMo draws from the workers' global generators.
* With `nemo_compat` noise is tested for silence, chosen and cut as in NeMo, faults included; the generators stay ours,
  so that a resumed run goes on as if it had not been stopped.
* Recordings are resampled by torchaudio, not by librosa's soxr as in NeMo: only those that have the configured rate
  already are equal to NeMo's to the last bit.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.audio import audio_info, read_audio
from data.bad_files import MET_KEY
from data.base import SystemData
from data.bucketing import BucketSampler
from data.concat_sampling import ConcatSampler
from data.errors import DataError
from data.noise_augmentation import augmented_noise
from data.noise_sampling import NoiseRecordings
from data.sampler import EpochSampler, ItemKey, item_key
from data.ssl_manifest import duration_s, read_recordings, within
from data.ssl_settings import SECTIONS, SpeechSettings, read_section

_TRIM_DB, _TRIM_FRAME, _TRIM_HOP = 60, 2048, 512  # NeMo's


class SpeechNoiseDataset(Dataset):
    """Item `(index, epoch)`: a recording, a noise to go with it, and the seeds of what is drawn later.

    Everything random is drawn from `np.random.default_rng([seed, epoch, index])`.

    Args:
        rows: manifest rows with `audio_filepath`, and `duration`, `offset` where given.
        settings: of the stage.
        noise_rows: the same of noises; empty: no noise.
        seed: see above.
        nemo_compat: see the head of this file.

    Shape:
        An item is {"audio": float32 `(S,)`, "noise": float32 `(N,)`, "mask_seed", "augmentation_seed": int,
        "name": str, "bad_files": messages of noises that could not be read}; N <= S, silence is as long as the
        recording.

    Raises:
        AudioError: from an item, when its recording cannot be read.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        settings: SpeechSettings,
        noise_rows: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
        nemo_compat: bool = False,
    ) -> None:
        self.rows = rows
        self.settings = settings
        self.seed = seed
        self.nemo_compat = nemo_compat
        self.noises = NoiseRecordings(noise_rows, sample_rate=settings.sample_rate, nemo_compat=nemo_compat)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any]:
        index, epoch = item_key(key, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        mask_seed, augmentation_seed = (int(number) for number in rng.integers(2**63, size=2))
        row = self.rows[index]
        audio = self._speech(row, rng)
        noise, messages = self.noises.draw(rng, len(audio))
        return {
            "audio": audio,
            "noise": noise,
            "mask_seed": mask_seed,
            "augmentation_seed": augmentation_seed,
            "name": row.get("id") or Path(row["audio_filepath"]).stem,
            MET_KEY: messages,
        }

    def _speech(self, row: Mapping[str, Any], rng: np.random.Generator) -> Tensor:
        """The recording, the part that the row is, or a crop of that; a short one is repeated. `(S,)`"""
        settings, channel = self.settings, self.settings.channel_selector
        offset, duration = row.get("offset", 0.0), row.get("duration")
        if settings.crop_s is not None:
            there = audio_info(row["audio_filepath"]).duration_s - offset  # a manifest may promise more
            spare = min(row.get("duration", there), there) - settings.crop_s
            if spare > 0:
                offset, duration = offset + rng.uniform(0, spare), settings.crop_s
        audio = read_audio(
            row["audio_filepath"],
            sample_rate=settings.sample_rate,
            offset_s=offset,
            duration_s=duration,
            channel=channel if isinstance(channel, int) else None,
        )
        if settings.trim_silence:
            audio = trimmed(audio)
        least = round(settings.min_audio_len_secs * settings.sample_rate)
        return audio.repeat(math.ceil(least / len(audio)))[:least] if len(audio) < least else audio

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, see `SelfSupervisedData`."""
        audio = pad_sequence([item["audio"] for item in items], batch_first=True)  # (B, S)
        length = torch.tensor([len(item["audio"]) for item in items])
        noise = torch.stack([_fitted(item["noise"], audio.shape[1]) for item in items])  # (B, S)
        noisy_length = length
        if (augmentor := self.settings.batch_augmentor) is not None:
            rngs = [random.Random(item["augmentation_seed"]) for item in items]
            noise, noisy_length = augmented_noise(
                audio,
                length,
                noise,
                torch.tensor([len(item["noise"]) for item in items]),
                settings=augmentor,
                rngs=rngs[:1] * len(items) if self.nemo_compat else rngs,
                nemo_compat=self.nemo_compat,
            )
        return {
            "audio": audio,
            "length": length,
            "noisy": audio + noise,
            "noisy_length": noisy_length,
            "mask_seed": torch.tensor([item["mask_seed"] for item in items]),
            "name": [item["name"] for item in items],
        }


def trimmed(signal: Tensor) -> Tensor:
    """A signal without the frames at its ends that are 60 dB or more below its loudest one, as `librosa.effects.trim`.

    Written out, since librosa compiles for seconds before it trims the first one.

    Shape: `(T,)` -> `(T',)`.
    """
    padded = np.pad(np.square(signal.numpy()), _TRIM_FRAME // 2)
    energy = np.lib.stride_tricks.sliding_window_view(padded, _TRIM_FRAME)[::_TRIM_HOP].mean(-1)  # (frames,)
    energy = np.maximum(energy, 1e-10)
    (loud,) = np.nonzero(energy > energy.max() * 10 ** (-_TRIM_DB / 10))
    return signal[loud[0] * _TRIM_HOP : (loud[-1] + 1) * _TRIM_HOP]


def _fitted(signal: Tensor, count: int) -> Tensor:
    """A signal `(N,)`, cut or continued with zeros. `(count,)`"""
    return pad(signal[:count], (0, max(0, count - len(signal))))


class SelfSupervisedData(SystemData):
    """Data of self-supervised pre-training.

    Batch: {"audio", "noisy": float32 `(B, S)`, zeros after their lengths, "length", "noisy_length": int64 `(B,)`
    samples, "mask_seed": int64 `(B,)`, of the masks (in evaluation the same in every epoch), "name": list of B}.

    Args:
        train_ds, validation_ds, test_ds: sections with NeMo's keys, see `SpeechSettings`; without a `manifest_filepath`
            a stage has no data. The test takes what its section does not say from validation_ds.
        test_manifest: in place of test_ds.manifest_filepath.
        nemo_compat: reproduce NeMo's faults.
        loader: as `SystemData`; `num_workers` and `pin_memory` null: as the section says.

        Others: as `SystemData`.

    Raises:
        DataError: a key or value of a section that cannot be used.
    """

    LENGTH_KEY = "crop_s"

    def __init__(
        self,
        *,
        train_ds: dict[str, Any] | None = None,
        validation_ds: dict[str, Any] | None = None,
        test_ds: dict[str, Any] | None = None,
        test_manifest: str | None = None,
        nemo_compat: bool = False,
        seed: int = 0,
        max_bad_files: int = 10,
        max_bad_fraction: float = 0.01,
        loader: dict[str, Any] | None = None,
    ) -> None:
        given = {key: value for key, value in (test_ds or {}).items() if value is not None}
        if test_manifest is not None:
            given["manifest_filepath"] = test_manifest
        without = {key: value for key, value in (validation_ds or {}).items() if key != "manifest_filepath"}
        self.settings = {
            "train": read_section("train", train_ds),
            "val": read_section("val", validation_ds),
            "test": read_section("test", without | given),
        }
        super().__init__(
            batch_size=self.settings["train"].batch_size,
            seed=seed,
            max_bad_files=max_bad_files,
            max_bad_fraction=max_bad_fraction,
            loader={key: value for key, value in (loader or {}).items() if value is not None},
        )
        self.manifests = {
            stage: None if settings.manifest_filepath is None else ", ".join(settings.manifest_filepath)
            for stage, settings in self.settings.items()
        }
        self.batch_sizes = {stage: settings.batch_size for stage, settings in self.settings.items()}
        self.nemo_compat = nemo_compat
        self._sizes: dict[str, list[int]] = {}  # rows of each manifest
        # Evaluation is the same in all runs; no training has its draws.
        self.seeds = {"train": 3 * self.seed, "val": 1, "test": 2}

    def key(self, stage: str, name: str) -> str:
        return f"model.{SECTIONS[stage]}.{name}"

    def batch_size_key(self, stage: str) -> str:
        return self.key(stage, "batch_size")

    def data_hint(self, stage: str) -> str:
        return f"set {self.key(stage, 'manifest_filepath')}=<file>"

    def rows(self, stage: str) -> list[dict[str, Any]] | None:
        paths = self.settings[stage].manifest_filepath
        if paths is None:
            return None
        if stage not in self._rows:
            settings = self.settings[stage]
            parts = [
                within(
                    read_recordings(path),
                    min_duration_s=settings.min_duration,
                    max_duration_s=settings.max_duration,
                    where=f"{self.key(stage, 'manifest_filepath')}={path}",
                )
                for path in paths
            ]
            self._rows[stage] = [row for part in parts for row in part]
            self._sizes[stage] = [len(part) for part in parts]
            self._bad_files.watch(self._rows[stage])
        return self._rows[stage]

    def dataset(self, stage: str) -> Dataset | None:
        rows, settings = self.rows(stage), self.settings[stage]
        if rows is None:
            return None
        noise_rows = [row for path in settings.noise_manifest or () for row in read_recordings(path)]
        self._bad_files.watch(noise_rows)
        return SpeechNoiseDataset(
            rows, settings=settings, noise_rows=noise_rows, seed=self.seeds[stage], nemo_compat=self.nemo_compat
        )

    def sampler(self, stage: str, dataset: Dataset) -> EpochSampler:
        settings, training = self.settings[stage], stage == "train"
        common: dict[str, Any] = {
            "seed": self.seed,
            "shuffle": training and settings.shuffle,
            "drop_last": training if settings.drop_last is None else settings.drop_last,
            **self.position(stage),
        }
        if settings.is_concat:
            return self._concat_sampler(stage, dataset, common)
        if settings.use_bucketing:
            durations_s = [min(duration_s(row), settings.crop_s or math.inf) for row in self.rows(stage) or ()]
            return BucketSampler(dataset, durations_s=durations_s, **common)  # type: ignore[arg-type]
        return EpochSampler(dataset, **common)  # type: ignore[arg-type]

    def _concat_sampler(self, stage: str, dataset: Dataset, common: dict[str, Any]) -> ConcatSampler:
        settings = self.settings[stage]
        common["shuffle"] = common["shuffle"] and settings.concat_shuffle
        if settings.concat_sampling_seed is not None:
            common["seed"] = settings.concat_sampling_seed
        try:
            return ConcatSampler(
                dataset,  # type: ignore[arg-type]
                sizes=self._sizes[stage],
                technique=settings.concat_sampling_technique,
                temperature=settings.concat_sampling_temperature,
                probabilities=settings.concat_sampling_probabilities,
                scale=settings.concat_sampling_scale,
                **common,
            )
        except ValueError as error:
            raise DataError(self.key(stage, str(error))) from None

    def loader_settings(self, stage: str) -> dict[str, Any]:
        settings = self.settings[stage]
        own = {"num_workers": settings.num_workers, "pin_memory": "auto" if settings.pin_memory else False}
        return own | self.loader
