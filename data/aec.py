"""Data of the echo canceller: examples made from single talkers, or recordings of a microphone with its far end.

A manifest of talkers (rows with `audio_filepath`, `speaker`) is made into examples on the fly, one of recordings
(`mic_filepath`, `farend_filepath`, …) is read as it is; each of train, val and test may be either.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch.utils.data import Dataset

from data.base import SystemData
from data.cache import fits
from data.checks import number, whole_number
from data.echo_path import EchoPath
from data.echo_scenarios import SCENARIO_WEIGHTS
from data.echo_synthesis import EchoDataset, EchoMixing
from data.errors import DataError
from data.fixed_echo import ECHO_FILES, FixedEchoDataset, longest_delay_ms
from data.loudspeaker import Loudspeaker
from data.manifest import TALKER_KEYS, is_echo, is_mixture
from data.ranges import Range
from data.recorded_echoes import RecordedEchoes
from data.rooms import MeasuredRooms, RoomSettings, ShoeboxRooms
from data.stft_cache import SpectrumCache

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", EchoMixing, EchoPath, Loudspeaker, RoomSettings)


class EchoData(SystemData):
    """Data of the echo canceller.

    Batch: {"mic", "far", "target": `(B, T)`, "has_target", "length", "scenario", "delay_samples",
    "path_change_sample", "ser_db", "snr_db": `(B,)`, "name": list of B}, of examples made here also "near", "echo",
    "noise": `(B, T)`, with *stft_cache* of recordings "mic_spectrum", "far_spectrum": `(B, F, frames, 2)`; see
    `EchoDataset` and `FixedEchoDataset`.

    Args:
        sample_rate: rate of all signals in Hz.
        segment_s: length of a training example in seconds.
        eval_segment_s: length of a validation or test example; recordings are taken whole.
        eval_seed: seed of the validation and, in another way, of the test examples.
        max_delay_ms: the longest delay that the model looks for; None: unknown. A warning when examples may have more.

        Of examples made from single talkers only:
        noise_manifest, val_noise_manifest, test_noise_manifest: recordings of noise for each stage; None: no noise.
        rir_manifest, val_rir_manifest, test_rir_manifest: measured responses (rows with `room`) for each stage, see
            `MeasuredRooms`; None: made rooms only.
        recorded_echo_manifest, val_recorded_echo_manifest, test_recorded_echo_manifest: recordings of far-end single
            talk for each stage, see `RecordedEchoes`; None: made echoes only.
        scenario_weights, rir_p, recorded_echo_p, snr_db, noise_p, far_snr_db, far_noise_p, ser_db, level_db,
        far_level_db, near_end_far_p, far_dropout_p, far_dropout_ms, clip_p, clip_db, target_ms: see `EchoMixing`.
        nonlinear_p, speaker_clip, speaker_soft_clip_p, speaker_distortion, speaker_highpass_hz, speaker_lowpass_hz,
            speaker_response_db: see `Loudspeaker`.
        delay_ms, delay_jump_p, delay_jump_ms, drift_ppm, path_change_p, path_change_fade_ms, gain_step_p,
        gain_step_db: see `EchoPath`.
        num_rooms, room_size_m, t60_s, speaker_distance_m, talker_distance_m, rir_s: see
            `RoomSettings`.
        train_examples: examples per epoch.
        val_examples: validation examples; 0: no validation, of any kind.
        test_examples: test examples; 0: no test.
        stft_cache: a folder that keeps the spectra of recordings that are read whole, in validation and test; None:
            none. A DataError where the examples of these are made, or there are none.
        stft, window: the transform of these spectra, as the system has it.
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
        sample_rate: int = 16000,
        segment_s: float = 4.0,
        eval_segment_s: float = 8.0,
        eval_seed: int = 5,
        max_delay_ms: float | None = None,
        scenario_weights: Mapping[str, float] = SCENARIO_WEIGHTS,
        noise_manifest: str | None = None,
        val_noise_manifest: str | None = None,
        test_noise_manifest: str | None = None,
        noise_p: float = 0.8,
        snr_db: Range = (0.0, 40.0),
        far_noise_p: float = 0.3,
        far_snr_db: Range = (10.0, 40.0),
        ser_db: Range = (-10.0, 10.0),
        level_db: Range = (-40.0, -15.0),
        far_level_db: Range = (-40.0, -15.0),
        nonlinear_p: float = 0.8,
        speaker_clip: Range = (0.6, 0.95),
        speaker_soft_clip_p: float = 0.3,
        speaker_distortion: Range = (0.1, 1.0),
        speaker_highpass_hz: Range | None = (80.0, 300.0),
        speaker_lowpass_hz: Range | None = None,
        speaker_response_db: float = 0.0,
        num_rooms: int | None = 200,
        room_size_m: Sequence[Range] = ((3.0, 8.0), (2.5, 6.0), (2.3, 3.5)),
        t60_s: Range = (0.15, 0.6),
        speaker_distance_m: Range = (0.05, 0.6),
        talker_distance_m: Range = (0.3, 2.0),
        rir_s: float = 0.5,
        rir_manifest: str | None = None,
        val_rir_manifest: str | None = None,
        test_rir_manifest: str | None = None,
        rir_p: float = 0.5,
        recorded_echo_manifest: str | None = None,
        val_recorded_echo_manifest: str | None = None,
        test_recorded_echo_manifest: str | None = None,
        recorded_echo_p: float = 0.5,
        delay_ms: Range = (0.0, 150.0),
        delay_jump_p: float = 0.0,
        delay_jump_ms: Range = (-50.0, 50.0),
        drift_ppm: Range = (0.0, 0.0),
        path_change_p: float = 0.1,
        path_change_fade_ms: Range = (20.0, 200.0),
        gain_step_p: float = 0.1,
        gain_step_db: Range = (-6.0, 6.0),
        far_dropout_p: float = 0.0,
        far_dropout_ms: Range = (50.0, 500.0),
        near_end_far_p: float = 0.3,
        target_ms: float | None = None,
        clip_p: float = 0.05,
        clip_db: Range = (1.0, 6.0),
        train_examples: int = 2000,
        val_examples: int = 60,
        test_examples: int = 60,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
        stft_cache: str | None = None,
        stft: str | None = None,
        window: str | None = None,
    ) -> None:
        keys = locals()
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

        def settings(kind: type[Settings]) -> Settings:
            """The settings of one part of the synthesis, whose fields are keys of the configuration."""
            return kind(**{field.name: keys[field.name] for field in fields(kind)})  # type: ignore[arg-type]

        self.mixing, self.loudspeaker = settings(EchoMixing), settings(Loudspeaker)
        self.path, self.room_settings = settings(EchoPath), settings(RoomSettings)
        self.sample_rate = whole_number("sample_rate", sample_rate, least=1)
        segment_s = number("segment_s", segment_s, least=1 / self.sample_rate)
        eval_segment_s = number("eval_segment_s", eval_segment_s, least=1 / self.sample_rate)
        self.segments_s = {"train": segment_s, "val": eval_segment_s, "test": eval_segment_s}
        if self.path.delay_ms[1] >= 1000 * min(segment_s, eval_segment_s):
            shortest = "segment_s" if segment_s <= eval_segment_s else "eval_segment_s"
            raise ValueError(f"delay_ms must stay below {shortest}, or echoes come after the end; got {delay_ms}")
        eval_seed = whole_number("eval_seed", eval_seed, least=0)
        # Three ranges that do not meet: no seed of training has the rooms and draws of an evaluation.
        self.seeds = {"train": 3 * seed, "val": 3 * eval_seed + 1, "test": 3 * eval_seed + 2}
        self.max_delay_ms = None if max_delay_ms is None else number("max_delay_ms", max_delay_ms, least=0)
        self.num_examples = {
            "train": whole_number("train_examples", train_examples, least=1),
            "val": whole_number("val_examples", val_examples, least=0),
            "test": whole_number("test_examples", test_examples, least=0),
        }
        self.noise_manifests = {"train": noise_manifest, "val": val_noise_manifest, "test": test_noise_manifest}
        self.rir_manifests = {"train": rir_manifest, "val": val_rir_manifest, "test": test_rir_manifest}
        self.recorded_manifests = {
            "train": recorded_echo_manifest,
            "val": val_recorded_echo_manifest,
            "test": test_recorded_echo_manifest,
        }
        for key, manifests in (
            ("noise_manifest", self.noise_manifests),
            ("rir_manifest", self.rir_manifests),
            ("recorded_echo_manifest", self.recorded_manifests),
        ):
            for stage, value in manifests.items():
                if not isinstance(value, str | None):
                    typed = key if stage == "train" else f"{stage}_{key}"
                    raise ValueError(f"{typed} must be the path of a manifest, got {value!r}")
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache must be true, false or auto, got {cache!r}")
        self.cache: dict[str, Any] = {
            "cache": cache,
            "cache_limit_mb": number("cache_limit_mb", cache_limit_mb, least=0),
        }
        if not isinstance(stft_cache, str | None) or stft_cache == "":
            raise ValueError(f"stft_cache must be a folder, got {stft_cache!r}")
        if stft_cache is not None and (stft is None or window is None):
            raise ValueError("stft_cache needs stft and window: set data.stft and data.window to what the model has")
        self.stft_cache, self.stft, self.window = stft_cache, stft, window
        self._warned: set[str] = set()

    def has_data(self, stage: str) -> bool:
        return self.num_examples[stage] > 0 and super().has_data(stage)

    def dataset(self, stage: str) -> Dataset | None:
        rows = self.rows(stage)
        if rows is None:
            return None
        training = stage == "train"
        if self.stft_cache is not None:
            self._check_whole(("val", "test") if training else (stage,))
        common: dict[str, Any] = {"sample_rate": self.sample_rate, "seed": self.seeds[stage]}
        if is_mixture(rows[0]):
            raise DataError(
                f"{self.manifests[stage]}: holds mixtures of talkers (mix_filepath); echo cancellation needs single"
                " talkers (audio_filepath, speaker) or recordings (mic_filepath, farend_filepath)"
            )
        if is_echo(rows[0]):
            if training:
                log.info("the training examples are recordings: the keys of their synthesis have no effect")
            self._warn_of_delays(longest_delay_ms(rows), str(self.manifests[stage]))
            if stage != "test":
                self._check_targets(rows, f"data.{stage}_manifest={self.manifests[stage]}")
            return FixedEchoDataset(
                rows,
                segment_s=self.segments_s[stage] if training else None,
                spectra=None if training else self._spectra(),
                cache=training and fits(rows, sample_rate=self.sample_rate, files=ECHO_FILES, **self.cache),
                **common,
            )
        longest_ms = self.path.largest_delay_ms(max(self.segments_s.values()))
        self._warn_of_delays(longest_ms + self.room_settings.largest_direct_ms(), "data.delay_ms")
        noise_manifest, rir_manifest = self.noise_manifests[stage], self.rir_manifests[stage]
        recorded_manifest = self.recorded_manifests[stage]
        measured = recorded = None
        if rir_manifest is not None:
            measured = MeasuredRooms(
                self.read_rows(rir_manifest, required=TALKER_KEYS),
                sample_rate=self.sample_rate,
                rir_s=self.room_settings.rir_s,
            )
        if recorded_manifest is not None:
            recorded = RecordedEchoes(self.read_rows(recorded_manifest), sample_rate=self.sample_rate)
        return EchoDataset(
            rows,
            num_items=self.num_examples[stage],
            segment_s=self.segments_s[stage],
            mixing=self.mixing,
            loudspeaker=self.loudspeaker,
            path=self.path,
            rooms=ShoeboxRooms(self.room_settings, **common),
            measured=measured,
            recorded=recorded,
            noise_rows=None if noise_manifest is None else self.read_rows(noise_manifest, required=TALKER_KEYS),
            **common,
            **self.cache,
        )

    def _spectra(self) -> SpectrumCache | None:
        if self.stft_cache is None:
            return None
        assert self.stft is not None and self.window is not None
        return SpectrumCache(self.stft_cache, preset=self.stft, window=self.window, sample_rate=self.sample_rate)

    def _check_whole(self, stages: Sequence[str]) -> None:
        """Spectra can be kept of those stages whose recordings are read whole: of all that there are, one at least."""
        rows = {stage: self.rows(stage) for stage in stages}
        made = [stage for stage, own in rows.items() if own is not None and not is_echo(own[0])]
        if made or not any(rows.values()):
            what = f"{made[0]} examples are made anew" if made else "training examples are made or cropped anew"
            raise DataError(
                f"data.stft_cache={self.stft_cache}: {what}, only recordings that are read whole (val_manifest,"
                " test_manifest) have spectra to keep; set data.stft_cache=null"
            )

    def _check_targets(self, rows: Sequence[Mapping[str, Any]], where: str) -> None:
        """Recordings without a target cannot be learned from, and silence alone teaches to be silent."""
        if any("clean_filepath" in row for row in rows):
            return
        if all(row["scenario"] != "far_end" for row in rows):
            raise DataError(
                f"{where}: no recording has a target, which is clean_filepath, or silence in far-end single talk"
            )
        log.warning("%s: no row has clean_filepath, so a mute output is the best: add rows that have it", where)

    def _warn_of_delays(self, longest_ms: float | None, where: str) -> None:
        """One warning per source when echoes may come later than the model looks."""
        if longest_ms is None or self.max_delay_ms is None or longest_ms <= self.max_delay_ms or where in self._warned:
            return
        self._warned.add(where)
        log.warning(
            "%s: echoes come up to %.0f ms after the far end, the model looks for %.0f ms at most: raise"
            " model.align.max_delay_ms or take longer delays out",
            where,
            longest_ms,
            self.max_delay_ms,
        )
