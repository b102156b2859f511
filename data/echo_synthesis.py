"""Examples of echo cancellation, made on the fly from recordings of single talkers.

    far -> loudspeaker -> delay of the device -> room -> echo
                          near-end talker -----> room -> near         microphone = near + echo + noise

Decisions that are not obvious
* Every training epoch draws new speakers, crops, rooms and levels; validation and test examples are those of epoch 0
  with seeds of their own. All are drawn from the same distribution: single talk and double talk, clipped or not.
* Each link of the chain draws from a random stream of its own, and draws all that it may need whatever the settings
  are: without noise or with another loudspeaker an example has the same talkers, crops and levels.
* Reference and echo are made from the same crop, from rest: no echo of what was played before it.
* The target is the near end as it is in the microphone, or its early part: same gain, same direct path. A network that
  is to remove reverberation too (`target_ms`) has no shift to learn.
* A recorded echo takes the place of loudspeaker, delay and room. It comes with its own far end, is brought to the level
  that a made one would have, and has no known delay.
* Where the reference drops out, the echo goes on: the loudspeaker plays, the recording of the reference fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cache import talk_and_noise
from data.checks import number
from data.crops import random_crop, speech_crop
from data.echo_levels import gain_for_ratio_db, gain_to_level, level_ratio_db
from data.echo_path import Echo, EchoPath, convolve
from data.echo_scenarios import SCENARIO_WEIGHTS, SCENARIOS, collate_echo, scenario_probabilities
from data.errors import DataError
from data.loudspeaker import Loudspeaker
from data.manifest import place_of
from data.ranges import Range, check_range
from data.recorded_echoes import RecordedEcho, RecordedEchoes
from data.rooms import MeasuredRooms, Response, Responses, ShoeboxRooms, early_part
from data.sampler import ItemKey, item_key

_NEAR, _FAR, _ROOM, _LOUDSPEAKER, _PATH, _NOISE, _FAR_NOISE, _LEVELS, _DEFECTS, _RECORDED = range(1, 11)
"""Streams beside (seed, epoch, index) itself, which draws scenario and speakers; 0 would be the same as that."""


@dataclass(frozen=True, kw_only=True)
class EchoMixing:
    """What examples are made of, and at which levels. Ranges are [low, high] and drawn from uniformly.

    Args:
        scenario_weights: how often each of `SCENARIOS` comes, relative to the others.
        rir_p: share of the examples in measured rooms, where there are such.
        recorded_echo_p: share of the examples with an echo (double talk and far-end single talk) whose echo and far end
            are recorded, where there are such.
        noise_p: share of the examples with noise in the microphone.
        snr_db: level of the near end (in far-end single talk: of the echo) over that noise.
        far_noise_p: share of the far ends with noise, which is in the reference and in the echo.
        far_snr_db: level of the far-end talker over it.
        ser_db: level of the near end over the echo in double talk.
        level_db: RMS of the microphone, dB relative to full scale; lower where it would pass full scale.
        far_level_db: the same of the reference.
        near_end_far_p: share of near-end single talk whose far end talks but is not heard (a headset); otherwise the
            reference is silence.
        far_dropout_p: share of the references that are silent for a while,
        far_dropout_ms: so long.
        clip_p: share of the microphones that clip,
        clip_db: so far below their peak. The components stay as they are.
        target_ms: how much of the near end's response the target keeps after the direct path; None: all.

    Raises:
        ValueError: a value that cannot be used, by its key in the configuration.
    """

    scenario_weights: Mapping[str, float] = field(default_factory=SCENARIO_WEIGHTS.copy)
    rir_p: float = 0.5
    recorded_echo_p: float = 0.5
    noise_p: float = 0.8
    snr_db: Range = (0.0, 40.0)
    far_noise_p: float = 0.3
    far_snr_db: Range = (10.0, 40.0)
    ser_db: Range = (-10.0, 10.0)
    level_db: Range = (-40.0, -15.0)
    far_level_db: Range = (-40.0, -15.0)
    near_end_far_p: float = 0.3
    far_dropout_p: float = 0.0
    far_dropout_ms: Range = (50.0, 500.0)
    clip_p: float = 0.05
    clip_db: Range = (1.0, 6.0)
    target_ms: float | None = None

    def __post_init__(self) -> None:
        scenario_probabilities(self.scenario_weights)
        shares = ("rir_p", "recorded_echo_p", "noise_p", "far_noise_p", "near_end_far_p", "far_dropout_p", "clip_p")
        for name in shares:
            number(name, getattr(self, name), least=0, most=1)
        for name in ("snr_db", "far_snr_db", "ser_db"):
            check_range(name, getattr(self, name), least=-100, most=100)
        for name in ("level_db", "far_level_db"):
            check_range(name, getattr(self, name), least=-100, most=0)
        check_range("far_dropout_ms", self.far_dropout_ms, least=0)
        check_range("clip_db", self.clip_db, least=0, most=100)
        if self.target_ms is not None:
            number("target_ms", self.target_ms, least=0)


class EchoDataset(Dataset):
    """Item `(index, epoch)`: two different speakers in a scenario, a room, a loudspeaker, noise, random levels.

    Everything random is drawn from `np.random.default_rng([seed, epoch, index])` and streams beside it.

    Args:
        rows: manifest rows with `audio_filepath`, `duration`, `speaker`.
        num_items: examples per epoch.
        sample_rate: rate of the signals in Hz.
        mixing, loudspeaker, path: how examples, loudspeakers and echo paths are drawn.
        rooms: give the responses of loudspeaker and talker.
        measured: measured rooms, or None.
        recorded: recorded echoes, or None.
        noise_rows: manifest rows with `audio_filepath`, `duration`; None: no noise, at neither end.
        segment_s: length in seconds.
        seed: see above.
        cache: keep decoded recordings in memory; "auto": when all of them take no more than `cache_limit_mb`.
        cache_limit_mb: see `cache`; each loader worker has a cache of its own.

    Shape:
        An item is {"mic", "far", "target", "near", "echo", "noise": float32 `(T,)`, "has_target": bool `()`, "length",
        "scenario", "path_change_sample": int64 `()`, "delay_samples", "ser_db", "snr_db": float32 `()`, "name": str}.
        `mic == near + echo + noise`, added in this order, unless it clips. `delay_samples` and `path_change_sample`
        are as in `Echo`. The ratios are those of the near end: inf without echo or noise, else -inf without near end.

    Raises:
        DataError: a row without speaker, or fewer than two speakers. An item raises AudioError when a recording cannot
            be read.
    """

    collate = staticmethod(collate_echo)

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_items: int,
        sample_rate: int,
        mixing: EchoMixing,
        loudspeaker: Loudspeaker,
        path: EchoPath,
        rooms: ShoeboxRooms,
        measured: MeasuredRooms | None = None,
        recorded: RecordedEchoes | None = None,
        noise_rows: Sequence[Mapping[str, Any]] | None = None,
        segment_s: float = 4.0,
        seed: int = 0,
        cache: bool | str = "auto",
        cache_limit_mb: float = 1024,
    ) -> None:
        rows_of = _rows_by_speaker(rows)
        self.num_items = num_items
        self.sample_rate = sample_rate
        self.num_samples = round(segment_s * sample_rate)
        self.seed = seed
        self.mixing, self.loudspeaker, self.path = mixing, loudspeaker, path
        self.rooms, self.measured, self.recorded = rooms, measured, recorded
        self._scenario_p = scenario_probabilities(mixing.scenario_weights)
        self._speakers = sorted(rows_of)
        self._rows_of = [rows_of[speaker] for speaker in self._speakers]
        self._talkers, self._noises = talk_and_noise(
            rows, noise_rows, sample_rate=sample_rate, cache=cache, cache_limit_mb=cache_limit_mb
        )

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any]:
        index, epoch = item_key(key, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        streams = {k: np.random.default_rng([self.seed, epoch, index, k]) for k in range(_NEAR, _RECORDED + 1)}
        scenario = int(rng.choice(len(SCENARIOS), p=self._scenario_p))
        near_speaker, far_speaker = rng.choice(len(self._speakers), 2, replace=False)
        has_near, has_echo = SCENARIOS[scenario] != "far_end", SCENARIOS[scenario] != "near_end"
        headset = streams[_DEFECTS].random() < self.mixing.near_end_far_p
        silence = np.zeros(self.num_samples, np.float32)

        responses = self._responses(streams[_ROOM])
        near = target = silence
        if has_near:
            near, target = self._near_end(streams, near_speaker, responses.talker)
        recording = self._recording(streams[_RECORDED]) if has_echo else None
        if recording is not None:
            far, echo = recording.far, Echo(recording.echo, -1.0, -1)
        else:
            far = self._far_end(streams, far_speaker) if has_echo or headset else silence
            echo = self._echo(streams, far, responses) if has_echo else Echo(silence, -1.0, -1)
        levels = streams[_LEVELS]
        ser_db, level_db = levels.uniform(*self.mixing.ser_db), levels.uniform(*self.mixing.level_db)
        if has_near and has_echo:
            echo = echo._replace(signal=echo.signal * gain_for_ratio_db(near, echo.signal, ratio_db=ser_db))
        noise = self._noise(streams[_NOISE], near if has_near else echo.signal)
        gain = gain_to_level(near + echo.signal + noise, level_db=level_db)
        near, target, noise, echo = near * gain, target * gain, noise * gain, echo._replace(signal=echo.signal * gain)
        far = far * gain_to_level(far, level_db=levels.uniform(*self.mixing.far_level_db))

        mic = near + echo.signal + noise
        far_name = self._speakers[far_speaker] if recording is None else recording.name
        talkers = ((self._speakers[near_speaker], has_near), (far_name, far.any()))
        signals = {
            "mic": self._clipped(streams[_DEFECTS], mic),
            "far": self._dropped_out(streams[_DEFECTS], far),
            "target": target,
            "near": near,
            "echo": echo.signal,
            "noise": noise,
        }
        return {
            **{name: torch.from_numpy(signal.copy()) for name, signal in signals.items()},  # no two share memory
            "has_target": torch.tensor(True),
            "length": torch.tensor(self.num_samples),
            "scenario": torch.tensor(scenario),
            "delay_samples": torch.tensor(echo.delay_samples, dtype=torch.float32),
            "path_change_sample": torch.tensor(echo.path_change_sample),
            "ser_db": torch.tensor(level_ratio_db(near, echo.signal), dtype=torch.float32),
            "snr_db": torch.tensor(level_ratio_db(near, noise), dtype=torch.float32),
            "name": "_".join([SCENARIOS[scenario], *(name for name, there in talkers if there), f"{index:06d}"]),
        }

    def _recording(self, rng: np.random.Generator) -> RecordedEcho | None:
        """A recorded echo; None where it is to be made."""
        if rng.random() < self.mixing.recorded_echo_p and self.recorded is not None:
            return self.recorded.draw(rng, self.num_samples)
        return None

    def _responses(self, rng: np.random.Generator) -> Responses:
        """Responses of a measured or a made room."""
        if rng.random() < self.mixing.rir_p and self.measured is not None:
            return self.measured.draw(rng)
        return self.rooms.draw(rng)

    def _near_end(
        self, streams: dict[int, np.random.Generator], speaker: int, response: Response
    ) -> tuple[np.ndarray, np.ndarray]:
        """The near end at the microphone, and the target. `(T,)`, `(T,)`"""
        talk = speech_crop(self._talkers, streams[_NEAR], self._rows_of[speaker], self.num_samples).numpy()
        near = convolve(talk, response.taps, lead=response.lead)
        if self.mixing.target_ms is None:
            return near, near
        early = early_part(response, target_ms=self.mixing.target_ms, sample_rate=self.sample_rate)
        return near, convolve(talk, early.taps, lead=early.lead)

    def _far_end(self, streams: dict[int, np.random.Generator], speaker: int) -> np.ndarray:
        """The far end as it is sent, at the level of its recording. `(T,)`"""
        talk = speech_crop(self._talkers, streams[_FAR], self._rows_of[speaker], self.num_samples).numpy()
        rng = streams[_FAR_NOISE]
        noisy, snr_db = rng.random() < self.mixing.far_noise_p, rng.uniform(*self.mixing.far_snr_db)
        return talk + self._noise_crop(rng, talk, snr_db) if noisy else talk

    def _echo(self, streams: dict[int, np.random.Generator], far: np.ndarray, responses: Responses) -> Echo:
        """The echo, at a level that says nothing yet."""
        return self.path.echo(
            self.loudspeaker.play(far, streams[_LOUDSPEAKER], sample_rate=self.sample_rate),
            streams[_PATH],
            response=responses.loudspeaker,
            moved=responses.moved,
            sample_rate=self.sample_rate,
        )

    def _noise(self, rng: np.random.Generator, reference: np.ndarray) -> np.ndarray:
        """Noise below the reference, or silence. `(T,)`"""
        noisy, snr_db = rng.random() < self.mixing.noise_p, rng.uniform(*self.mixing.snr_db)
        return self._noise_crop(rng, reference, snr_db) if noisy else np.zeros_like(reference)

    def _noise_crop(self, rng: np.random.Generator, reference: np.ndarray, snr_db: float) -> np.ndarray:
        if self._noises is None:
            return np.zeros_like(reference)
        noise = random_crop(self._noises, rng, range(len(self._noises.num_samples)), self.num_samples).numpy()
        return noise * gain_for_ratio_db(reference, noise, ratio_db=snr_db)

    def _clipped(self, rng: np.random.Generator, mic: np.ndarray) -> np.ndarray:
        clips, clip_db = rng.random() < self.mixing.clip_p, rng.uniform(*self.mixing.clip_db)
        limit = np.abs(mic).max() * np.float32(10 ** (-clip_db / 20))
        return np.clip(mic, -limit, limit) if clips else mic

    def _dropped_out(self, rng: np.random.Generator, far: np.ndarray) -> np.ndarray:
        drops, length_ms, place = (
            rng.random() < self.mixing.far_dropout_p,
            rng.uniform(*self.mixing.far_dropout_ms),
            rng.random(),
        )
        length = min(round(length_ms * self.sample_rate / 1000), self.num_samples)
        start = int(place * (self.num_samples - length + 1))
        if drops:
            far = far.copy()
            far[start : start + length] = 0
        return far


def _rows_by_speaker(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Speaker -> numbers of its rows."""
    rows_of: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        where = place_of(row)
        if not row.get("speaker"):
            raise DataError(f"{where}: its manifest row has no speaker; near and far end must be different ones")
        rows_of.setdefault(row["speaker"], []).append(index)
    if len(rows_of) < 2:
        raise DataError(f"{where}: {next(iter(rows_of))} is the only speaker; near and far end must be different ones")
    return rows_of
