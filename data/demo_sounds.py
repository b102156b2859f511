"""Noises and rooms of the demo corpus, made from random numbers and geometry.

Noises imitate what disturbs a call: broadband noise, mains hum, a fan, typing, other people. Rooms are
shoebox rooms (pyroomacoustics, image sources); each gives two responses to one microphone, from a loudspeaker
and from a talker, as echo cancellation needs them.
"""

from collections.abc import Callable

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

from data.demo_speech import RMS_DBFS, SAMPLE_RATE


def shaped_noise(rng: np.random.Generator, num_samples: int, *, slope_db_per_octave: float) -> np.ndarray:
    """Gaussian noise whose power falls by `slope_db_per_octave` above 40 Hz: 0 white, 3 pink, 6 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(hz / 40, 1) ** (-slope_db_per_octave / (20 * np.log10(2)))
    spectrum[hz < 20] = 0
    return np.fft.irfft(spectrum, num_samples)


def hum(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Mains hum: harmonics of 50 or 60 Hz over a little noise."""
    time_s = np.arange(num_samples) / SAMPLE_RATE
    mains_hz = rng.choice([50.0, 60.0]) * rng.uniform(0.998, 1.002)
    tones = sum(
        rng.uniform(0.2, 1) / k * np.sin(2 * np.pi * (k * mains_hz * time_s + rng.random())) for k in range(1, 25)
    )
    return tones + 0.05 * rng.standard_normal(num_samples)


def fan(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A fan: falling noise, beaten at the blade rate, with the blade tone and slow drift."""
    time_s = np.arange(num_samples) / SAMPLE_RATE
    blade_hz = rng.uniform(25, 110)
    phase = 2 * np.pi * blade_hz * (time_s + 0.02 * np.sin(2 * np.pi * rng.uniform(0.05, 0.3) * time_s))
    air = shaped_noise(rng, num_samples, slope_db_per_octave=rng.uniform(3, 5))
    air /= air.std()
    return air * (1 + rng.uniform(0.2, 0.6) * np.sin(phase)) + 0.3 * np.sin(2 * phase)


def typing(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Key strokes: two short resonant clicks each (down and up), in bursts, over quiet room noise."""
    strokes = np.zeros(num_samples)
    position = 0.0
    while True:
        position += SAMPLE_RATE * (rng.exponential(1.0) if rng.random() < 0.08 else rng.uniform(0.06, 0.25))
        if position >= num_samples:
            break
        loudness = rng.uniform(0.4, 1)
        strokes[int(position)] += loudness
        release = int(position + SAMPLE_RATE * rng.uniform(0.05, 0.1))
        if release < num_samples:
            strokes[release] -= 0.4 * loudness
    clicks = np.zeros(num_samples)
    for _mode in range(4):
        hz, decay_s = rng.uniform(300, 6000), rng.uniform(0.002, 0.015)
        radius = np.exp(-1 / (decay_s * SAMPLE_RATE))
        clicks += lfilter([1.0], [1, -2 * radius * np.cos(2 * np.pi * hz / SAMPLE_RATE), radius**2], strokes)
    floor = shaped_noise(rng, num_samples, slope_db_per_octave=3)
    return clicks / np.abs(clicks).max() + 0.01 * floor / floor.std()


def rain(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Rain: a bright wash with slow swells, and single drops."""
    time_s = np.arange(num_samples) / SAMPLE_RATE
    wash = sosfilt(butter(1, [800, 7000], "band", fs=SAMPLE_RATE, output="sos"), rng.standard_normal(num_samples))
    swell = 1 + 0.4 * np.sin(2 * np.pi * (rng.uniform(0.1, 0.4) * time_s + rng.random()))
    drops = (rng.random(num_samples) < 60 / SAMPLE_RATE) * rng.exponential(4.0, num_samples)
    return wash * swell + sosfilt(butter(2, [1500, 6000], "band", fs=SAMPLE_RATE, output="sos"), drops) * 3


def babble(rng: np.random.Generator, num_samples: int, speech: list[np.ndarray]) -> np.ndarray:
    """Several people at once: `speech` clips looped from random starts and summed at similar loudness."""
    mix = np.zeros(num_samples)
    for clip in speech:
        looped = np.resize(np.roll(clip, int(rng.integers(len(clip)))), num_samples)
        mix += looped / (looped.std() + 1e-9) * rng.uniform(0.6, 1.0)
    return mix


NOISES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "fan": fan,
    "typing": typing,
    "pink": lambda rng, n: shaped_noise(rng, n, slope_db_per_octave=rng.uniform(2.5, 3.5)),
    "rain": rain,
    "hum": hum,
    "brown": lambda rng, n: shaped_noise(rng, n, slope_db_per_octave=rng.uniform(5, 7)),
    "white": lambda rng, n: shaped_noise(rng, n, slope_db_per_octave=rng.uniform(-0.5, 0.5)),
}
NOISE_KINDS = ("babble", *NOISES)


def make_noise(kind: str, *, seed: int, index: int, duration_s: float, speech: list[np.ndarray]) -> np.ndarray:
    """One noise clip at 16 kHz and -25 dBFS RMS (less if its peaks need it). `speech` serves babble only."""
    rng = np.random.default_rng([seed, 4, index])
    num_samples = round(duration_s * SAMPLE_RATE)
    samples = babble(rng, num_samples, speech) if kind == "babble" else NOISES[kind](rng, num_samples)
    gain = 10 ** (RMS_DBFS / 20) / samples.std()
    return (samples * min(gain, 0.97 / np.abs(samples).max())).astype(np.float32)


def make_room(*, seed: int, index: int) -> tuple[dict[str, np.ndarray], float]:
    """Responses {"loudspeaker", "talker"} of one random room at 16 kHz, and its reverberation time in
    seconds.

    The loudspeaker stands 0.15 to 0.6 m from the microphone (a laptop, a desk phone), the talker 0.4 to 1.5
    m. Each response is scaled to a peak of 0.9, so their ratio is left to whoever mixes.
    """
    import pyroomacoustics as pra  # here, as it takes a second to import and nothing else needs it

    rng = np.random.default_rng([seed, 5, index])
    size = rng.uniform([2.8, 2.5, 2.3], [7.0, 5.5, 3.2])
    rt60_s = float(rng.uniform(0.15, 0.5))
    absorption, max_order = pra.inverse_sabine(rt60_s, size)
    room = pra.ShoeBox(size, fs=SAMPLE_RATE, materials=pra.Material(absorption), max_order=min(max_order, 40))
    microphone = rng.uniform([1.0, 1.0, 0.7], [size[0] - 1.0, size[1] - 1.0, 1.3])
    responses = {}
    for kind, nearest_m, farthest_m in (("loudspeaker", 0.15, 0.6), ("talker", 0.4, 1.5)):
        direction = rng.standard_normal(3) * [1, 1, 0.5]
        offset = direction / np.linalg.norm(direction) * rng.uniform(nearest_m, farthest_m)
        room.add_source(np.clip(microphone + offset, 0.2, size - 0.2))
        responses[kind] = None
    room.add_microphone(microphone)
    room.compute_rir()
    for kind, response in zip(responses, room.rir[0], strict=True):
        response = response[: round(1.2 * rt60_s * SAMPLE_RATE)]
        responses[kind] = (0.9 * response / np.abs(response).max()).astype(np.float32)
    return responses, rt60_s
