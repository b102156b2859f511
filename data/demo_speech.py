"""Speech of the demo corpus: the synthesiser as a child process, and what makes a talker's voice of its voice."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import firwin2, oaconvolve, resample_poly

from data.demo_text import sentences
from data.demo_voices import Voice
from data.errors import DataError

SAMPLE_RATE = 16000
RMS_DBFS = -25.0
COMMAND = [sys.executable, "-m", "data.espeak"]


class VoiceError(ValueError):
    """One voice of the synthesiser cannot be used."""


class Synthesiser:
    """The synthesis program (data/espeak.py) as a child process; use it in a `with` statement.

    What it says depends on what it said before, so each talker gets a process of its own.
    Raises DataError when the program does not start (its own message tells why) or dies.
    """

    def __init__(self) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody empties could block it
        self._process = subprocess.Popen(
            COMMAND,
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
        )
        try:
            self.sample_rate = int(self._read_line()["sample_rate"])
        except DataError:
            self.__exit__()
            raise

    def __enter__(self) -> "Synthesiser":
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def _read_line(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            exit_code = self._process.wait()
            self._messages.seek(0)
            said = self._messages.read().decode(errors="replace").strip().splitlines()
            if exit_code == 2 and said:
                raise DataError(said[-1].removeprefix("error: "))
            raise DataError(f"the speech synthesiser stopped with exit code {exit_code}: {' '.join(said[-1:])}")
        return json.loads(line)

    def speak(self, text: str, *, voice: str, rate: float, pitch: float, liveliness: float) -> np.ndarray:
        """Samples (num_samples,) float32 in -1..1 at `sample_rate`. Raises VoiceError for an unknown voice."""
        request = {
            "text": text,
            "voice": voice,
            "rate": round(rate),
            "pitch": round(min(max(pitch, 0), 99)),
            "range": round(min(max(liveliness, 0), 99)),
        }
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._read_line()
        answer = self._read_line()
        if "error" in answer:
            raise VoiceError(f"{voice}: {answer['error']}")
        samples = self._process.stdout.read(2 * answer["num_samples"])
        return np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768


def utterances(synthesiser: Synthesiser, voice: Voice, *, seed: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """`count` pairs of text and samples at 16 kHz, about 4 to 6 s long.

    How many characters fill the time depends on language and pace; it is learnt from what has been spoken so far.
    Raises VoiceError if the voice gives no sound.
    """
    chars_per_s = voice.words_per_minute / 11
    for index in range(count):
        rng = np.random.default_rng([seed, 3, *voice.colour_seed, index])
        target_s = rng.uniform(4.3, 5.7)
        prosody = {
            "rate": voice.words_per_minute / voice.tract * rng.uniform(0.95, 1.05),
            "pitch": voice.pitch_setting + rng.uniform(-3, 3),
            "liveliness": voice.liveliness + rng.uniform(-8, 8),
        }
        for _attempt in range(6):
            text = sentences(rng, language=voice.language, num_chars=round(target_s * chars_per_s))
            raw = synthesiser.speak(text, voice=voice.espeak, **prosody)
            samples = trim(change_tract(raw, synthesiser.sample_rate, voice.tract))
            duration_s = len(samples) / SAMPLE_RATE
            if duration_s < 0.5:
                raise VoiceError(f"{voice.espeak}: gives no sound")
            chars_per_s = len(text) / duration_s
            if 4.0 <= duration_s <= 6.0:
                break
        samples = add_breath(samples, rng, level_db=voice.breath_db)
        yield text, level(oaconvolve(samples, colour(voice.colour_seed), mode="same"), rng)


def change_tract(samples: np.ndarray, sample_rate: int, tract: float) -> np.ndarray:
    """To 16 kHz, with pitch and formants multiplied by `tract` (and the duration divided by it)."""
    ratio = Fraction(SAMPLE_RATE / (sample_rate * tract)).limit_denominator(200)
    return resample_poly(samples, ratio.numerator, ratio.denominator)


def trim(samples: np.ndarray, *, margin_s: float = 0.05, floor_db: float = -40.0) -> np.ndarray:
    """Cut silence at both ends, fade over 5 ms. An input without sound gives an empty array."""
    frame = SAMPLE_RATE // 100
    frames = samples[: len(samples) // frame * frame].reshape(-1, frame)  # (num_frames, frame)
    energy = (frames**2).mean(axis=1)
    if not energy.any():
        return samples[:0]
    loud = np.flatnonzero(energy > energy.max() * 10 ** (floor_db / 10))
    margin = round(margin_s * SAMPLE_RATE)
    cut = samples[max(loud[0] * frame - margin, 0) : (loud[-1] + 1) * frame + margin].copy()
    ramp = np.linspace(0, 1, SAMPLE_RATE // 200)
    cut[: len(ramp)] *= ramp[: len(cut)]
    cut[-len(ramp) :] *= ramp[::-1][-len(cut) :]
    return cut


def add_breath(samples: np.ndarray, rng: np.random.Generator, *, level_db: float) -> np.ndarray:
    """Add noise that follows the loudness, `level_db` relative to the speech: vowels of the synthesiser have none."""
    window = np.hanning(SAMPLE_RATE // 50)
    envelope = oaconvolve(np.abs(samples), window / window.sum(), mode="same")
    breath = envelope * np.diff(rng.standard_normal(len(samples) + 1))  # the difference gives it the hiss of breath
    return samples + breath * 10 ** (level_db / 20) * samples.std() / (breath.std() + 1e-12)


@lru_cache(maxsize=8)
def colour(colour_seed: tuple[int, ...]) -> np.ndarray:
    """The recording chain of a talker: 129 linear-phase taps at 16 kHz, a tilt and three broad resonances."""
    rng = np.random.default_rng(colour_seed)
    hz = np.geomspace(60, SAMPLE_RATE / 2, 64)
    octaves = np.log2(hz / 1000)
    gain_db = rng.uniform(-1.5, 1.5) * octaves
    for centre in rng.uniform(np.log2(0.25), np.log2(6), size=3):
        gain_db += rng.uniform(-5, 5) * np.exp(-0.5 * ((octaves - centre) / 0.4) ** 2)
    gain = 10 ** (np.concatenate([gain_db[:1], gain_db]) / 20)
    return firwin2(129, np.concatenate([[0], hz]), gain, fs=SAMPLE_RATE)


def level(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale to -25 dBFS RMS, give or take 2 dB, and keep peaks below full scale."""
    rms = np.sqrt(np.mean(samples**2)) + 1e-12
    gain = 10 ** ((RMS_DBFS + rng.uniform(-2, 2)) / 20) / rms
    return (samples * min(gain, 0.97 / (np.abs(samples).max() + 1e-12))).astype(np.float32)
