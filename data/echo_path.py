"""From the loudspeaker's terminals to the microphone: delays of the device, and the room, both of which may change.

The delay of the device (buffers of the sound card, the network stack of a Bluetooth loudspeaker) comes first, the room
after it, as in the world: where a buffer slips, the room smooths the click.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.signal import fftconvolve

from data.checks import number
from data.ranges import Range, check_range
from data.rooms import Response

_HALF = 32  # taps on each side of a fractional delay; flat within 0.1 dB up to 0.95 of Nyquist
_BLOCK = 16  # samples that share a delay when the clocks drift: at 1000 ppm a step of 0.016 sample
_RAMP_S = 0.01  # of a step in gain
_EARLIEST, _LATEST = 0.2, 0.8  # where in the clip a change may come, as shares of it


def convolve(signal: np.ndarray, taps: np.ndarray, *, lead: int = 0) -> np.ndarray:
    """The response of a system from rest, as long as the signal; `taps[lead]` is its time 0.

    Shape: `(T,)`, `(N,)` -> `(T,)`
    """
    return fftconvolve(signal, taps)[lead : lead + len(signal)]


def delay(signal: np.ndarray, delay_samples: float) -> np.ndarray:
    """The signal later by any number of samples, zeros before it, its end cut off.

    Whole delays move samples, others go through a windowed sinc (Laakso et al., "Splitting the Unit Delay", IEEE
    Signal Processing Magazine 1996).

    Shape: `(T,)` -> `(T,)`
    """
    whole = math.floor(delay_samples)
    kernel = _sinc(np.array([delay_samples - whole]))[0]
    if delay_samples == whole:
        filtered, begin = signal, -whole
    else:
        filtered, begin = np.convolve(signal, kernel.astype(signal.dtype)), _HALF - 1 - whole
    moved = np.concatenate([np.zeros(max(0, -begin), signal.dtype), filtered[max(0, begin) :]])[: len(signal)]
    return np.pad(moved, (0, len(signal) - len(moved)))


def drifting_delay(signal: np.ndarray, delay_samples: float, *, drift_ppm: float) -> np.ndarray:
    """A delay that grows by `drift_ppm` samples per million and is `delay_samples` in the middle of the signal.

    Shape: `(T,)` -> `(T,)`
    """
    num_blocks = math.ceil(len(signal) / _BLOCK)
    middles = _BLOCK * (np.arange(num_blocks) + 0.5)
    delays = delay_samples + drift_ppm * 1e-6 * (middles - len(signal) / 2)  # (num_blocks,)
    whole = np.floor(delays).astype(int)
    kernels = _sinc(delays - whole)[:, ::-1].astype(signal.dtype)  # (num_blocks, 2 * _HALF)
    margin = max(0, int(whole.max())) + _HALF, max(0, -int(whole.min())) + _HALF + _BLOCK
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(signal, margin), 2 * _HALF)
    first = margin[0] - _HALF + np.arange(num_blocks) * _BLOCK - whole  # of each block's first window
    blocks = windows[first[:, None] + np.arange(_BLOCK)]  # (num_blocks, _BLOCK, 2 * _HALF)
    return (blocks @ kernels[..., None]).reshape(-1)[: len(signal)]


def _sinc(fractions: np.ndarray) -> np.ndarray:
    """Kernels of delays from 0 to 1 whose tap `_HALF - 1` is time 0. `(N,)` -> `(N, 2 * _HALF)`"""
    time = np.arange(1 - _HALF, _HALF + 1) - fractions[:, None]
    window = np.cos(np.pi * time / (2 * _HALF)) ** 2  # 0 at both ends of the kernel, which moves with the fraction
    return np.sinc(time) * window


class Echo(NamedTuple):
    """An echo `(T,)`, its delay against the reference in samples (-1: none that holds throughout), and the sample at
    which the response changes (-1: it does not)."""

    signal: np.ndarray
    delay_samples: float
    path_change_sample: int


@dataclass(frozen=True, kw_only=True)
class EchoPath:
    """How echo paths are drawn. Ranges are [low, high] and drawn from uniformly; a change comes in the middle 60 % of
    a clip.

    Args:
        delay_ms: delay of the device.
        delay_jump_p: share of the echoes whose delay jumps (a buffer slips),
        delay_jump_ms: by this; the delay does not fall below 0. Such an echo has no known delay.
        drift_ppm: difference of the clocks of playback and recording; the known delay is that of the clip's middle.
        path_change_p: share of the echoes whose loudspeaker is moved (another response of the room), where the room
            has another response,
        path_change_fade_ms: within this time. The known delay is that of the beginning.
        gain_step_p: share of the echoes whose level changes (somebody turns the knob),
        gain_step_db: by this.

    Raises:
        ValueError: a value that cannot be used, by its key in the configuration.
    """

    delay_ms: Range = (0.0, 150.0)
    delay_jump_p: float = 0.0
    delay_jump_ms: Range = (-50.0, 50.0)
    drift_ppm: Range = (0.0, 0.0)
    path_change_p: float = 0.1
    path_change_fade_ms: Range = (20.0, 200.0)
    gain_step_p: float = 0.1
    gain_step_db: Range = (-6.0, 6.0)

    def __post_init__(self) -> None:
        for name in ("delay_jump_p", "path_change_p", "gain_step_p"):
            number(name, getattr(self, name), least=0, most=1)
        check_range("delay_ms", self.delay_ms, least=0)
        check_range("delay_jump_ms", self.delay_jump_ms, least=-10_000, most=10_000)
        check_range("drift_ppm", self.drift_ppm, least=-1000, most=1000)
        check_range("path_change_fade_ms", self.path_change_fade_ms, least=0)
        check_range("gain_step_db", self.gain_step_db, least=-100, most=100)

    def largest_delay_ms(self, segment_s: float) -> float:
        """The longest delay that the device may have in a clip."""
        jump_ms = max(0.0, self.delay_jump_ms[1]) if self.delay_jump_p > 0 else 0.0
        drift_ms = max(map(abs, self.drift_ppm)) * 1e-3 * segment_s / 2
        return self.delay_ms[1] + jump_ms + drift_ms

    def echo(
        self,
        played: np.ndarray,
        rng: np.random.Generator,
        *,
        response: Response,
        moved: Response | None,
        sample_rate: int,
    ) -> Echo:
        """The echo of what a loudspeaker plays, along one path drawn from `rng`.

        Args:
            played: output of the loudspeaker.
            rng: what is drawn does not depend on the settings, so none of them shifts another.
            response: of the room, from the loudspeaker to the microphone.
            moved: the same after the loudspeaker was moved; None: it stays where it is.
            sample_rate: in Hz.

        Shape: played float32 `(T,)` -> float32 `(T,)`
        """
        num_samples = len(played)
        jumps, changes, steps = rng.random(3) < (self.delay_jump_p, self.path_change_p, self.gain_step_p)
        places = np.floor(rng.uniform(_EARLIEST, _LATEST, 3) * num_samples).astype(int)
        bulk = rng.uniform(*self.delay_ms) * sample_rate / 1000
        jump = rng.uniform(*self.delay_jump_ms) * sample_rate / 1000
        drift_ppm = rng.uniform(*self.drift_ppm)
        fade = rng.uniform(*self.path_change_fade_ms) * sample_rate / 1000
        step_db = rng.uniform(*self.gain_step_db)

        def delayed(samples: float) -> np.ndarray:
            return drifting_delay(played, samples, drift_ppm=drift_ppm) if drift_ppm else delay(played, samples)

        late = delayed(bulk)
        if jumps:
            late[places[0] :] = delayed(max(0.0, bulk + jump))[places[0] :]
        signal = convolve(late, response.taps, lead=response.lead)
        if changes and moved is not None:
            share = _ramp(num_samples, places[1], fade)
            signal = signal + share * (convolve(late, moved.taps, lead=moved.lead) - signal)
        if steps:
            signal = signal * 10 ** (step_db / 20 * _ramp(num_samples, places[2], _RAMP_S * sample_rate))
        return Echo(
            signal.astype(np.float32),
            -1.0 if jumps else bulk + response.direct_samples,
            int(places[1]) if changes and moved is not None else -1,
        )


def _ramp(num_samples: int, start: int, length: float) -> np.ndarray:
    """0 up to sample `start`, 1 from `length` samples later on, a line between. `(num_samples,)`"""
    return np.clip((np.arange(num_samples, dtype=np.float32) - start) / np.float32(max(1.0, length)), 0, 1)
