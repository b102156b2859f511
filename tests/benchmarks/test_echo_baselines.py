"""The classical cancellers: how signals are handed to them, and that the real ones cancel."""

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.accept_deepvqe import BASELINES
from benchmarks.echo_baselines import SAMPLE_RATE, speex, webrtc_aec3

ROOT = Path(__file__).parent.parent.parent


def echo_of_noise(delay_samples: int) -> tuple[Tensor, Tensor]:
    """Far end, and a microphone that hears its echo only."""
    generator = torch.Generator().manual_seed(0)
    far = 0.1 * torch.randn(4 * SAMPLE_RATE, generator=generator)
    room = torch.randn(400, generator=generator) * torch.exp(-torch.arange(400) / 60)
    room = torch.nn.functional.pad(0.5 * room / room.norm(), (delay_samples, 0))
    spectrum = torch.fft.rfft(far, 2 * len(far)) * torch.fft.rfft(room, 2 * len(far))
    return torch.fft.irfft(spectrum)[: len(far)], far


def test_frames_are_16_bit_clipped_padded_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fakes in the packages' place: the far end of a frame comes before its microphone."""
    calls: list[tuple[str, np.ndarray]] = []

    class Frame:
        def __init__(self, data: bytes, rate: int, channels: int, samples: int) -> None:
            assert (rate, channels, samples, len(data)) == (16000, 1, 160, 320)
            self.data = bytearray(data)

    class Module:
        def __init__(self, **switches: bool) -> None:
            assert switches == {"echo_cancellation": True, "noise_suppression": False}

        def process_reverse_stream(self, frame: Frame) -> None:
            calls.append(("far", np.frombuffer(bytes(frame.data), np.int16)))

        def process_stream(self, frame: Frame) -> None:
            calls.append(("mic", np.frombuffer(bytes(frame.data), np.int16)))
            frame.data[:] = (np.frombuffer(bytes(frame.data), np.int16) // 2).tobytes()

    rtc, apm = ModuleType("livekit.rtc"), ModuleType("livekit.rtc.apm")
    rtc.AudioFrame, apm.AudioProcessingModule = Frame, Module
    for name, module in {"livekit": ModuleType("livekit"), "livekit.rtc": rtc, "livekit.rtc.apm": apm}.items():
        monkeypatch.setitem(sys.modules, name, module)
    mic = torch.full((250,), 0.5)
    mic[0] = 3.0
    output = webrtc_aec3(mic, -mic)
    assert [name for name, _ in calls] == ["far", "mic", "far", "mic"]
    assert calls[1][1][:2].tolist() == [32767, 16384] and calls[0][1][0] == -32768
    assert calls[3][1][89:91].tolist() == [16384, 0]
    assert output.shape == mic.shape and output[1:].eq(0.25).all()


@pytest.mark.parametrize(("canceller", "package"), [(webrtc_aec3, "livekit"), (speex, "pyaec")])
def test_the_real_ones_cancel_an_echo(canceller, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install '.[aec_baselines]')")
    mic, far = echo_of_noise(320)
    output = canceller(mic, far)
    late = slice(3 * SAMPLE_RATE, None)
    assert output.shape == mic.shape
    assert 10 * torch.log10(mic[late].square().sum() / output[late].square().sum()) > 10
    assert torch.equal(output, canceller(mic, far)), "the same again"


def test_the_extra_pins_what_the_harness_asks_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {install for _, _, install in BASELINES.values()} == set(extras["aec_baselines"])
    tests = (ROOT / "requirements-test.txt").read_text().splitlines()
    run = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(extras["aec"]) <= {*tests, *run}
