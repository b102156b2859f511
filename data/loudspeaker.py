"""A loudspeaker that distorts: amplifier clipping, an uneven cone, a limited band.

Order of a distorting one: brought to full scale, clipped (hard or soft), bent by an asymmetric sigmoid, mixed with what
came in, band-limited, and brought back to the level it came with. The sigmoid is the memoryless model that most work on
learned echo cancellation uses (Zhang and Wang, "Deep Learning for Acoustic Echo Cancellation in Noisy and Double-Talk
Scenarios", Interspeech 2018): it passes one half-wave more steeply than the other, so it makes even harmonics too.

Decisions that are not obvious
* How much is distorted is drawn, not a matter of the recording's level: how far a loudspeaker is turned up has nothing
  to do with the level of the digital reference.
* The sigmoid's two half-waves differ eightfold in slope at any level: what no linear filter explains then lies 9 dB
  below the sound. Few devices are that bad, so the share of the distorted sound is drawn: at 0.1 it is about -29 dB.
* The band limit has no phase, so it does not shift the echo against its reference and the known delay stays true.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

from data.checks import number
from data.echo_levels import gain_for_ratio_db, rms
from data.ranges import Range, check_range

_HIGHPASS_ORDER, _LOWPASS_ORDER = 2, 4  # a closed box, and what reconstruction filters leave
_LOWEST_OCTAVE_HZ, _NUM_OCTAVES = 62.5, 8  # up to 8 kHz
_MARGIN_S = 0.1  # of zeros, into which a filter without phase may ring on both sides


def hard_clip(signal: np.ndarray, share: float) -> np.ndarray:
    """Cut off what passes `share` of the largest magnitude. Shape: `(T,)` -> `(T,)`"""
    limit = share * np.abs(signal).max(initial=0.0)
    return np.clip(signal, -limit, limit)


def soft_clip(signal: np.ndarray, share: float) -> np.ndarray:
    """Approach `share` of the largest magnitude smoothly, `limit * tanh(x / limit)`. Shape: `(T,)` -> `(T,)`"""
    limit = share * np.abs(signal).max(initial=0.0)
    return limit * np.tanh(signal / limit) if limit > 0 else signal


def sigmoid_distortion(signal: np.ndarray, gain: float = 1.0) -> np.ndarray:
    """`gain * (2 / (1 + exp(-a * b)) - 1)` with `b = 1.5 x - 0.3 x**2`, `a = 4` where `b > 0`, otherwise 0.5.

    Shape: `(T,)` -> `(T,)`
    """
    b = 1.5 * signal - 0.3 * signal**2
    a = np.where(b > 0, 4, 0.5).astype(signal.dtype)
    return gain * (2 / (1 + np.exp(-a * b)) - 1)


def band_limit(
    signal: np.ndarray,
    *,
    sample_rate: int,
    highpass_hz: float | None = None,
    lowpass_hz: float | None = None,
    octaves_db: np.ndarray | None = None,
) -> np.ndarray:
    """Butterworth magnitudes (order 2 below, 4 above; -3 dB at the given frequencies) without phase.

    *octaves_db*: gains at 62.5 Hz, 125 Hz and so on, on straight lines between them and level beyond.

    Shape: `(T,)` -> `(T,)`
    """
    if highpass_hz is None and lowpass_hz is None and octaves_db is None:
        return signal
    size = next_fast_len(len(signal) + round(_MARGIN_S * sample_rate), real=True)
    hz = rfftfreq(size, 1 / sample_rate)
    power = np.ones(len(hz))
    if highpass_hz is not None:
        ratio = (hz / highpass_hz) ** (2 * _HIGHPASS_ORDER)
        power = ratio / (1 + ratio)
    if lowpass_hz is not None:
        power = power / (1 + (hz / lowpass_hz) ** (2 * _LOWPASS_ORDER))
    if octaves_db is not None:
        octave = np.log2(np.maximum(hz, 1) / _LOWEST_OCTAVE_HZ)
        power = power * 10 ** (np.interp(octave, np.arange(len(octaves_db)), octaves_db) / 10)
    return irfft(rfft(signal, size) * np.sqrt(power).astype(signal.dtype), size)[: len(signal)]


@dataclass(frozen=True, kw_only=True)
class Loudspeaker:
    """How loudspeakers are drawn. Ranges are [low, high] and drawn from uniformly.

    Args:
        nonlinear_p: share of the examples whose loudspeaker distorts; the others only have their band.
        speaker_clip: level at which it clips, as a share of the peak.
        speaker_soft_clip_p: share of the distorting ones that clip softly.
        speaker_distortion: share of the distorted sound, 0 to 1; the rest is undistorted.
        speaker_highpass_hz: lower end of the band (small loudspeakers have no bass); None: none.
        speaker_lowpass_hz: upper end of the band; None: none.
        speaker_response_db: how far its response may be from flat, drawn anew for each octave.

    Raises:
        ValueError: a value that cannot be used, by its key in the configuration.
    """

    nonlinear_p: float = 0.8
    speaker_clip: Range = (0.6, 0.95)
    speaker_soft_clip_p: float = 0.3
    speaker_distortion: Range = (0.1, 1.0)
    speaker_highpass_hz: Range | None = (80.0, 300.0)
    speaker_lowpass_hz: Range | None = None
    speaker_response_db: float = 0.0

    def __post_init__(self) -> None:
        number("speaker_response_db", self.speaker_response_db, least=0, most=40)
        number("nonlinear_p", self.nonlinear_p, least=0, most=1)
        number("speaker_soft_clip_p", self.speaker_soft_clip_p, least=0, most=1)
        check_range("speaker_clip", self.speaker_clip, least=0.01, most=1)
        check_range("speaker_distortion", self.speaker_distortion, least=0, most=1)
        for name in ("speaker_highpass_hz", "speaker_lowpass_hz"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least=1, most=1e6)
        if self.speaker_highpass_hz and self.speaker_lowpass_hz:
            highest, lowest = self.speaker_highpass_hz[1], self.speaker_lowpass_hz[0]
            if highest >= lowest:
                raise ValueError(f"speaker_highpass_hz must end below speaker_lowpass_hz, got {highest} and {lowest}")

    def play(self, signal: np.ndarray, rng: np.random.Generator, *, sample_rate: int) -> np.ndarray:
        """What one loudspeaker, drawn from `rng`, makes of a signal; of the same RMS.

        Shape: float32 `(T,)` -> float32 `(T,)`
        """
        distorts, soft = rng.random(2) < (self.nonlinear_p, self.speaker_soft_clip_p)
        clip, distortion = rng.uniform(*self.speaker_clip), rng.uniform(*self.speaker_distortion)
        edges_hz = rng.random(2)  # drawn in any case, so that neither limit shifts the other
        highpass_hz = _between(self.speaker_highpass_hz, edges_hz[0])
        lowpass_hz = _between(self.speaker_lowpass_hz, edges_hz[1])
        octaves_db = self.speaker_response_db * rng.uniform(-1, 1, _NUM_OCTAVES) if self.speaker_response_db else None
        peak = float(np.abs(signal).max(initial=0.0))
        if peak == 0:
            return signal
        played = signal
        if distorts:
            bent = sigmoid_distortion((soft_clip if soft else hard_clip)(signal / peak, clip))
            bent = bent * gain_for_ratio_db(signal, bent, ratio_db=0.0, level=rms)
            played = signal + distortion * (bent - signal)
        played = band_limit(
            played, sample_rate=sample_rate, highpass_hz=highpass_hz, lowpass_hz=lowpass_hz, octaves_db=octaves_db
        )
        return (played * gain_for_ratio_db(signal, played, ratio_db=0.0, level=rms)).astype(np.float32)


def _between(limits: Range | None, position: float) -> float | None:
    return None if limits is None else limits[0] + position * (limits[1] - limits[0])
