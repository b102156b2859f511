"""Scorers: that each is called as it wants to be, what it cannot judge, what happens when its package is missing."""

import sys
import types
import warnings

import numpy as np
import pytest
import torch

from metrics import perceptual
from metrics.perceptual import SCORERS, Clip, NoScore, applies, clip_at_16khz, importable, score

SCENARIOS = ("double_talk", "far_end", "near_end")


def voiced(seconds: float = 1.5, rate_hz: int = 16000) -> np.ndarray:
    """Harmonics of a wavering pitch in syllables: enough of speech for PESQ to find utterances."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(120 * (1 + 0.05 * np.sin(2 * np.pi * 3 * time))) / rate_hz
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tone * np.sqrt(np.clip(np.sin(2 * np.pi * 2 * time), 0, None))).astype(np.float32)


def clip(output: np.ndarray, *, scenario: str = "double_talk", target: np.ndarray | None = None) -> Clip:
    far = voiced()[::-1].copy()
    mic = voiced() + 0.5 * far
    return Clip(output, mic[: output.size], far[: output.size], target, scenario)


@pytest.fixture
def speechmos(monkeypatch: pytest.MonkeyPatch) -> list:
    """speechmos with networks that take no time; the list of what they were called with."""
    calls = []

    def aecmos(signals, rate_hz, talk_type):
        calls.append((signals, rate_hz, talk_type))
        return {"echo_mos": 4.0, "deg_mos": 3.0, "talk_type": talk_type}

    def dnsmos(signal, rate_hz):
        calls.append((signal, rate_hz))
        return {"sig_mos": np.float64(3.5), "bak_mos": np.float64(4.5), "ovrl_mos": np.float64(3.0), "p808_mos": 3.0}

    package = types.ModuleType("speechmos")
    for name, run in (("aecmos", aecmos), ("dnsmos", dnsmos)):
        module = types.ModuleType(f"speechmos.{name}")
        module.run = run
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"speechmos.{name}", module)
    monkeypatch.setitem(sys.modules, "speechmos", package)
    return calls


def test_pesq_and_stoi_fall_with_noise():
    target = voiced()
    noise = np.random.default_rng(1).standard_normal(target.size).astype(np.float32)
    for name, best in (("pesq", 4.64), ("stoi", 1.0)):
        found = [score(name, clip(target + level * noise, target=target))[name] for level in (0.0, 1e-3, 1e-2)]
        assert found[0] == pytest.approx(best, abs=0.01)
        assert found == sorted(found, reverse=True) and found[2] < found[0] - 0.05


@pytest.mark.parametrize("name", ["pesq", "stoi"])
@pytest.mark.parametrize("case", ["target", "output", "both", "constant output", "short", "not finite"])
def test_what_cannot_be_compared_has_no_score(name, case):
    target, output = voiced(), voiced()
    if case in ("target", "both"):
        target = 0 * target
    if case in ("output", "both"):
        output = 0 * output
    if case == "constant output":
        output = 0 * output + 0.5
    if case == "short":
        target, output = target[:3999], output[:3999]
    if case == "not finite":
        output[7] = np.nan
    with pytest.raises(NoScore), warnings.catch_warnings():
        warnings.simplefilter("error")
        score(name, clip(output, target=target))


def test_a_click_has_no_stoi():
    """Too few frames with sound: pystoi warns and returns 1e-5."""
    target = np.zeros(16000, np.float32)
    target[500] = 1
    with pytest.raises(NoScore, match="Not enough STFT frames"):
        score("stoi", clip(voiced(1.0), target=target))


def test_no_utterance_has_no_pesq(monkeypatch):
    import pesq

    def fails(*_):
        raise pesq.NoUtterancesError(b"No utterances detected")

    monkeypatch.setattr(pesq, "pesq", fails)
    with pytest.raises(NoScore, match="No utterances"):
        score("pesq", clip(voiced(), target=voiced()))


def test_aecmos_is_fooled_by_silence():
    """Why its scores stand beside the level."""
    silence, unprocessed = np.zeros(24000, np.float32), clip(voiced()).mic
    for scenario in ("double_talk", "far_end"):
        assert score("aecmos", clip(silence, scenario=scenario))["aecmos_echo"] > 4.4
        assert score("aecmos", clip(unprocessed, scenario=scenario))["aecmos_echo"] < 3.2


@pytest.mark.parametrize(("scenario", "talk_type"), [("double_talk", "dt"), ("far_end", "st"), ("near_end", "nst")])
def test_aecmos_is_told_the_scenario(speechmos, scenario, talk_type):
    output = np.concatenate([voiced(1.5)] * 15)  # 22.5 s
    found = score("aecmos", Clip(output, 0.5 * output, 0.2 * output, None, scenario))
    signals, rate_hz, told = speechmos.pop()
    assert (rate_hz, told) == (16000, talk_type)
    assert all(signal.size == 320000 - 1 for signal in signals.values())  # from 20 s on it logs a warning
    levels = [np.abs(signals[name]).max() / np.abs(output).max() for name in ("enh", "mic", "lpb")]
    assert levels == pytest.approx([1, 0.5, 0.2])
    assert (
        set(found)
        == {
            "dt": {"aecmos_echo", "aecmos_degradation"},
            "st": {"aecmos_echo"},
            "nst": {"aecmos_degradation"},
        }[talk_type]
    )


def test_dnsmos_columns(speechmos):
    assert score("dnsmos", clip(voiced())) == {"dnsmos_sig": 3.5, "dnsmos_bak": 4.5, "dnsmos_ovrl": 3.0}
    assert speechmos[0][1] == 16000


@pytest.mark.slow
def test_dnsmos_hears_noise():
    noise = np.random.default_rng(1).standard_normal(24000).astype(np.float32)
    quiet, loud = (score("dnsmos", clip(voiced() + level * noise))["dnsmos_bak"] for level in (0.0, 0.05))
    assert 1 <= loud < quiet <= 5


def test_clips_are_resampled_and_limited():
    for rate_hz in (8000, 16000, 24000, 48000):
        time = torch.arange(rate_hz) / rate_hz
        tone = 0.5 * torch.sin(2 * torch.pi * 440 * time)
        made = clip_at_16khz(tone, tone, 4 * tone, None, sample_rate=rate_hz, scenario="near_end")
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
        np.testing.assert_allclose(made.output[200:-200], expected[200:-200], atol=5e-3)
        assert made.far.max() == 1 and made.far.min() == -1
        assert made.output.dtype == np.float32 and made.target is None


def test_where_scores_apply():
    where = {
        (name, known): [scenario for scenario in SCENARIOS if applies(name, scenario, has_target=known)]
        for name in SCORERS
        for known in (True, False)
    }
    assert where["pesq", True] == where["stoi", True] == ["double_talk", "near_end"]
    assert where["pesq", False] == where["stoi", False] == []
    assert where["aecmos", False] == list(SCENARIOS)
    assert where["dnsmos", False] == ["double_talk", "near_end"]


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("pesq", "pesq", "pip install pesq"),
        ("stoi", "pystoi", "pip install pystoi"),
        ("aecmos", "speechmos.aecmos", "pip install speechmos librosa onnxruntime requests"),
        ("dnsmos", "speechmos.dnsmos", "pip install speechmos librosa onnxruntime requests"),
    ],
)
def test_a_missing_package_is_one_warning(monkeypatch, caplog, name, module, command):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError
    assert importable([name]) == ()
    (message,) = caplog.messages
    assert message.startswith(f"{name} is left out") and message.endswith(command) and "\n" not in message


def test_an_unknown_score_names_those_that_there_are():
    with pytest.raises(ValueError, match="scores must be a list of pesq, stoi, aecmos, dnsmos, got 'pesk'"):
        importable(["pesk"])


def test_importable_keeps_the_order(speechmos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importable(["stoi", "dnsmos", "pesq"]) == ("stoi", "dnsmos", "pesq")
    assert list(perceptual.SCORERS) == ["pesq", "stoi", "aecmos", "dnsmos"]


@pytest.mark.parametrize("name", ["aecmos", "dnsmos"])
def test_a_silent_microphone_is_nothing_to_listen_to(name):
    silence = np.zeros(16000, np.float32)
    with pytest.raises(NoScore, match="the mic is silent"):
        score(name, Clip(silence, silence, silence, None, "double_talk"))
