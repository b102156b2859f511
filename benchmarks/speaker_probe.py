"""Who speaks? A linear classifier on frozen features, where the channel says nothing.

There is one recording of each talker, so whoever knows the channel of a recording knows the talker. Therefore the first
half of a recording is for training and the second for testing, and each segment of either passes through a channel of
its own, several times: a room, the noise of a microphone and an equaliser. No room serves both halves, and no channel
is drawn with a look at the talker: what hears only the channel is right as often as chance
(tests/benchmarks/test_accept_nest.py).

Decisions that are not obvious
* Halves are cut into segments before anything else, so that no reverberation crosses the border.
* The noise stands above what the recordings bring along (a talker was known by the quietest frames alone without it).
* All segments have the same length and level.
* Every contestant has the same classifier: linear discriminants on each of its layers, the log-probabilities of the
  layers averaged. A log-mel spectrogram is a single layer. Shrinkage is chosen by cross-validation over the segments
  of the training halves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from data.audio import read_audio
from data.levels import gain_to
from data.manifest import place_of
from data.rooms import Response, RoomSettings, ShoeboxRooms

# `(B, S)` audio to `(B, L, D)`: L layers of D features each.
Features = Callable[[Tensor], Tensor]

_CHANNEL = 2  # third word of the seed of a segment's channel; five words are a room's
_NUM_BANDS = 8  # of the equaliser, octaves down from half the sample rate
_SHRINKAGE = (0.003, 0.01, 0.03, 0.1, 0.3, 0.7)
_BATCH_SIZE = 16


class Segments(NamedTuple):
    """Segments of one half of each recording: `audio` `(N, S)`, `speaker` `(N,)` the recording's number, `place` `(N,)`
    the segment's number within its half, which is that of all its draws."""

    audio: Tensor
    speaker: Tensor
    place: Tensor


def read_segments(
    rows: Sequence[Mapping[str, Any]], probe: Mapping[str, Any], *, sample_rate: int
) -> tuple[Segments, Segments]:
    """Segments of the first halves, and those of the second halves, through their channels.

    Args:
        rows: manifest rows, one recording per talker, each as long as two segments or longer.
        probe: `segment_s`; `draws`, channels per segment of a first and of a second half; `num_rooms` for each half;
            `equaliser_db`, largest gain of a band; `noise_snr_db`, a range; `level_db`, RMS of a segment; `seed`.
        sample_rate: in Hz.
    """
    size = round(probe["segment_s"] * sample_rate)
    recordings = [read_audio(row["audio_filepath"], sample_rate=sample_rate).numpy() for row in rows]
    halves = []
    for row, recording in zip(rows, recordings, strict=True):
        if len(recording) < 2 * size:
            raise SystemExit(f"error: {place_of(row)}: shorter than two segments of {probe['segment_s']:g} s")
    for half, draws in enumerate(probe["draws"]):
        settings = RoomSettings(num_rooms=probe["num_rooms"])
        rooms = ShoeboxRooms(settings, sample_rate=sample_rate, seed=2 * probe["seed"] + half)
        audio, speakers, places = [], [], []
        for speaker, recording in enumerate(recordings):
            middle = len(recording) // 2
            for place, segment in enumerate(cut(recording[middle:] if half else recording[:middle], size)):
                for draw in range(draws):
                    rng = np.random.default_rng([probe["seed"], half, _CHANNEL, speaker, place, draw])
                    heard = through_channel(segment, rooms.draw(rng).talker, rng, probe, sample_rate)
                    audio.append(torch.from_numpy(heard))
                    speakers.append(speaker)
                    places.append(place)
        signals = torch.stack(audio)
        signals *= gain_to(10 ** (probe["level_db"] / 20), signals)[:, None]
        halves.append(Segments(signals, torch.tensor(speakers), torch.tensor(places)))
    return halves[0], halves[1]


def cut(half: np.ndarray, size: int) -> list[np.ndarray]:
    """As many segments of `size` samples as fit, spread evenly."""
    starts = np.linspace(0, len(half) - size, len(half) // size).astype(int)
    return [half[start : start + size] for start in starts]


def through_channel(
    segment: np.ndarray, response: Response, rng: np.random.Generator, probe: Mapping[str, Any], sample_rate: int
) -> np.ndarray:
    """The segment as heard in a room, with white noise, through an equaliser; the direct path is not late. `(S,)`"""
    start, size = response.lead + round(response.direct_samples), len(segment)
    heard = fftconvolve(segment, response.taps)[start : start + size]
    heard = np.pad(heard, (0, size - len(heard)))
    noise = rng.standard_normal(size) * np.sqrt(np.square(heard).mean())
    heard = heard + noise * 10 ** (-rng.uniform(*probe["noise_snr_db"]) / 20)
    # A gain for each band, lines between them over the octaves; twice the length, so that nothing wraps around.
    octave = np.log2(np.fft.rfftfreq(2 * size, 1 / sample_rate).clip(1))
    bands = np.log2(sample_rate / 2) - np.arange(_NUM_BANDS)[::-1]
    gain_db = np.interp(octave, bands, rng.uniform(-probe["equaliser_db"], probe["equaliser_db"], _NUM_BANDS))
    spectrum = np.fft.rfft(heard, 2 * size) * 10 ** (gain_db / 20)
    return np.fft.irfft(spectrum)[:size].astype(np.float32)


@torch.inference_mode()
def accuracies(features: Features, train: Segments, test: Segments) -> list[float]:
    """Share of the test segments of each talker that are given to that talker."""
    known, heard = (
        torch.cat([features(audio) for audio in half.audio.split(_BATCH_SIZE)]).double() for half in (train, test)
    )  # (N, L, D), (M, L, D)
    layers = [
        log_probabilities(known[:, layer], train.speaker, train.place, heard[:, layer])
        for layer in range(known.shape[1])
    ]
    right = (torch.stack(layers).mean(0).argmax(1) == test.speaker).double()
    return [float(right[test.speaker == speaker].mean()) for speaker in range(int(test.speaker.max()) + 1)]


def log_probabilities(train: Tensor, speaker: Tensor, place: Tensor, test: Tensor) -> Tensor:
    """Of each class, by linear discriminants; `(N, D)`, `(N,)`, `(N,)`, `(M, D)` to `(M, C)`.

    The shrinkage is that of the best log-probabilities when the places of the training segments take turns in being
    tested; the least where no talker has two places.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-8)
    train, test = (train - mean) / std, (test - mean) / std
    score = torch.zeros(len(_SHRINKAGE), dtype=train.dtype)
    for turn in range(int(place.max()) + 1):
        rest = place != turn
        held = ~rest & torch.isin(speaker, speaker[rest])  # whoever has a single segment is not tested
        if not held.any():
            continue
        for index, result in enumerate(discriminants(train[rest], speaker[rest], train[held], _SHRINKAGE)):
            score[index] += result.gather(1, speaker[held, None]).sum()
    return discriminants(train, speaker, test, [_SHRINKAGE[int(score.argmax())]])[0]


def discriminants(train: Tensor, speaker: Tensor, test: Tensor, shrinkages: Sequence[float]) -> list[Tensor]:
    """Log-probabilities `(M, C)` for each shrinkage of the covariance towards a multiple of the unit matrix.

    Classes are equally likely; one without training segments is never given.
    """
    classes = int(speaker.max()) + 1
    count = torch.bincount(speaker, minlength=classes)
    sums = torch.zeros(classes, train.shape[1], dtype=train.dtype).index_add(0, speaker, train)
    means = sums / count.clamp(min=1)[:, None]
    within = train - means[speaker]
    variances, axes = torch.linalg.eigh(within.T @ within / len(train))
    means, test = means @ axes, test @ axes
    results = []
    for shrinkage in shrinkages:
        precision = 1 / ((1 - shrinkage) * variances + shrinkage * variances.mean())
        logits = (test * precision) @ means.T - 0.5 * (means**2 * precision).sum(1)
        results.append(logits.masked_fill(count == 0, -torch.inf).log_softmax(1))
    return results
