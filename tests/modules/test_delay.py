"""The delay of an echo is found where there is one, and none is made up where there is none."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.delay import estimate_delay

RATE = 16000


def noise(seed: int, seconds: float = 3.0) -> Tensor:
    return torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def speech_like(seed: int, seconds: float = 3.0) -> Tensor:
    """Coloured noise in bursts, with nothing above 4 kHz."""
    spectrum = torch.fft.rfft(noise(seed, seconds))
    frequency = torch.linspace(0, RATE / 2, len(spectrum))
    spectrum = spectrum / (1 + (frequency / 500) ** 2) * (frequency < 4000)
    bursts = torch.repeat_interleave(noise(seed + 1000, 10 / RATE) > 0, round(seconds * RATE) // 10)
    return torch.fft.irfft(spectrum)[: len(bursts)] * bursts


def delayed(signal: Tensor, samples: int) -> Tensor:
    """Later by so many samples, earlier where they are negative; as long as before."""
    return pad(signal, (samples, -samples))


def room(seed: int) -> Tensor:
    """A direct path, then a decaying tail of 100 ms. `(T,)`"""
    tail = noise(seed, 0.1) * torch.exp(-torch.linspace(0, 7, 1600))
    return torch.cat([torch.ones(1), 0.1 * tail])


def convolved(signal: Tensor, response: Tensor) -> Tensor:
    size = len(signal) + len(response)
    return torch.fft.irfft(torch.fft.rfft(signal, size) * torch.fft.rfft(response, size), size)[: len(signal)]


@pytest.mark.parametrize("samples", [0, 1, 800, 7999, -1, -480])
def test_a_shift_is_found_to_the_sample(samples: int) -> None:
    far = speech_like(0)
    for echo in (delayed(far, samples), -0.01 * delayed(far, samples)):
        seconds, confidence = estimate_delay(echo, far, sample_rate=RATE, max_s=0.5)
        assert seconds == samples / RATE and confidence > 50


@pytest.mark.parametrize("seed", range(3))
def test_an_echo_from_a_room_is_found_under_near_end_speech_and_noise(seed: int) -> None:
    far, near = speech_like(seed), speech_like(seed + 50)
    echo = delayed(convolved(far, room(seed)), 3200)
    mic = echo + near * echo.norm() / near.norm() + 0.01 * noise(seed + 90) * echo.std()
    seconds, confidence = estimate_delay(mic, far, sample_rate=RATE, max_s=1.0)
    assert seconds == 0.2 and confidence >= 9
    level = estimate_delay(100 * mic, 0.001 * far, sample_rate=RATE, max_s=1.0)
    assert level[0] == seconds and level[1] == pytest.approx(confidence, rel=1e-2), "levels do not matter"


@pytest.mark.parametrize("seed", range(5))
def test_no_delay_where_there_is_no_echo(seed: int) -> None:
    near, far = speech_like(seed), speech_like(seed + 50)
    seconds, confidence = estimate_delay(near, far, sample_rate=RATE, max_s=1.0)
    assert seconds is None and 0 < confidence < 9


def test_hum_and_an_offset_are_no_echo() -> None:
    far, near = speech_like(0), speech_like(50)
    hum = far.std() * (1 + torch.sin(2 * torch.pi * 50 / RATE * torch.arange(3 * RATE)))
    assert estimate_delay(near + hum, far + hum, sample_rate=RATE, max_s=1.0)[0] is None
    assert estimate_delay(delayed(far, 160) + hum, far + hum, sample_rate=RATE, max_s=1.0)[0] == 0.01


def test_silence_has_no_delay() -> None:
    far = speech_like(0)
    for mic, reference in ((0 * far, far), (far, 0 * far), (0 * far, 0 * far)):
        assert estimate_delay(mic, reference, sample_rate=RATE, max_s=0.5) == (None, 0.0)


def test_lengths_may_differ_and_be_shorter_than_the_longest_delay() -> None:
    far = speech_like(1)
    assert estimate_delay(delayed(far, 400)[:32000], far, sample_rate=RATE, max_s=0.5)[0] == 0.025
    short = noise(2, 0.1)
    assert estimate_delay(delayed(short, 160), short, sample_rate=RATE, max_s=5.0)[0] == 0.01
    assert estimate_delay(short[:1], short[:1], sample_rate=RATE, max_s=1.0)[0] is None
    assert estimate_delay(far.bfloat16(), far.bfloat16(), sample_rate=RATE, max_s=0.5)[0] == 0.0


def test_what_cannot_be_compared_is_refused() -> None:
    far = noise(0, 0.1)
    for mic, max_s, says in (
        (far[None], 1.0, r"\(T,\)"),
        (far[:0], 1.0, r"\(0,\)"),
        (far, 0.0, "max_s"),
        (far, -1, "-1"),
    ):
        with pytest.raises(ValueError, match=says):
            estimate_delay(mic, far, sample_rate=RATE, max_s=max_s)
