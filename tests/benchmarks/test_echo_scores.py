"""The measures of the echo acceptance run: delays, independent examples, what counts where."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.echo_scores import (
    MEASURES,
    Clip,
    advanced,
    cancel,
    collect,
    constant_delay,
    read_clips,
    score,
    summary,
    table,
)
from data.audio import write_audio
from data.manifest import write_manifest
from metrics import perceptual

RATE = 16000


def noise(seed: int, seconds: float = 0.5) -> Tensor:
    return 0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("delay", [0, 128, -37])
def test_a_constant_delay_is_found_and_taken_out(delay: int) -> None:
    mic = noise(0)
    late = advanced(mic, -delay)
    assert constant_delay([(late, mic)], max_samples=480) == delay
    whole = slice(abs(delay), len(mic) - abs(delay))
    assert torch.equal(advanced(late, delay)[whole], mic[whole])
    assert advanced(mic, 3)[-3:].eq(0).all() and advanced(mic, -3)[:3].eq(0).all()


def test_a_high_pass_filter_does_not_hide_the_delay() -> None:
    """Low voices dominate a plain cross-correlation, and their phases are the ones that such a filter turns."""
    white = torch.fft.rfft(noise(1, 2.0).double())
    hz = torch.linspace(0, RATE / 2, len(white))
    voice = torch.fft.irfft(white / (1 + (hz / 150) ** 2))
    s = 1j * hz / 250
    high_passed = torch.fft.irfft(torch.fft.rfft(voice) * (s / (1 + s)) ** 2)
    assert constant_delay([(advanced(high_passed, -64), voice)], max_samples=480) == 64


def test_silence_has_no_delay() -> None:
    assert constant_delay([(torch.zeros(4000), noise(0)[:4000])], max_samples=480) == 0


def test_only_the_clips_without_echo_tell_the_delay() -> None:
    """With echo, the microphone's loudest part is what the canceller takes out."""
    clips = [Clip("a", "synthetic", noise(0), noise(1), noise(2)), Clip("b", "near_end", noise(3), noise(4), None)]

    def late_by_16(mic: Tensor, far: Tensor) -> Tensor:
        return advanced(mic, -16) if mic is clips[1].mic else advanced(far, -200)

    outputs, delay = cancel(late_by_16, clips, RATE, may_be_late=True)
    assert delay == 16 and torch.equal(outputs["b"][:-16], clips[1].mic[:-16])


def test_an_output_that_is_not_finite_ends_the_run() -> None:
    clip = Clip("b", "near_end", noise(3), noise(4), None)
    with pytest.raises(SystemExit, match="the output for b is not finite"):
        cancel(lambda mic, far: mic / 0, [clip], RATE, may_be_late=False)


def test_recordings_of_one_near_end_count_once() -> None:
    clips = [Clip(name, "synthetic", noise(0), noise(1), noise(2)) for name in "abc"]
    clips += [Clip(f"{name}_alone", "alone", noise(2), noise(1), None) for name in "ab"]
    values = {"ours": {"a": {"pesq": 1.0}, "b": {"pesq": 3.0}, "c": {"pesq": 4.0}, "a_alone": {}, "b_alone": {}}}
    assert collect(MEASURES["pesq"], values, clips, [["a", "b"]]) == {"ours": [2.0, 4.0]}
    values["ours"]["a"]["pesq"] = None
    assert collect(MEASURES["pesq"], values, clips, [["a", "b"]]) == {"ours": [3.0, 4.0]}
    values["ours"] |= {"a_alone": {"level_db": -1.0}, "b_alone": {"level_db": -3.0}}
    assert collect(MEASURES["level"], values, clips, [["a", "b"]]) == {"ours": [-2.0]}


def test_the_worst_is_the_farthest_from_zero_and_none_is_nan() -> None:
    assert summary(MEASURES["worst_level"], [0.5, -2.0, 1.0])[0] == -2.0
    assert math.isnan(summary(MEASURES["worst_level"], [math.nan])[0])
    assert summary(MEASURES["level"], [1.0, 3.0, math.nan]) == (2.0, 1.0)
    text = table({"pesq": {"ours": [1.0, 3.0, math.nan], "silence": [math.nan] * 3}})
    assert "ours" in text and "double talk: PESQ-WB (2)" in text and "2.00 +- 1.00" in text
    assert text.splitlines()[1].endswith(" -")


def test_each_kind_of_clip_has_its_measures() -> None:
    near, echo = noise(2), noise(1)
    mic = near + echo
    perfect = score(Clip("a", "synthetic", mic, echo, near), near, sample_rate=RATE, scorers=())
    assert perfect["si_sdri_db"] > 70 and perfect["sdri_db"] > 70 and "erle_late_db" not in perfect
    silent = score(Clip("a", "synthetic", mic, echo, near), torch.zeros_like(mic), sample_rate=RATE, scorers=())
    assert silent["si_sdri_db"] < -70 and silent["sdri_db"] < -70 and silent["level_db"] == -80
    far_end = score(Clip("a", "far_end", echo, echo, None), 0.01 * echo, sample_rate=RATE, scorers=())
    assert far_end["erle_late_db"] == pytest.approx(40, abs=0.01) and "si_sdri_db" not in far_end


def test_a_filtered_near_end_loses_si_sdr_but_not_sdr() -> None:
    """What a canceller's own filter does to the phase is no echo: SDR allows for it."""
    near, echo = noise(2, 1.0), noise(1, 1.0)
    filtered = near - torch.nn.functional.pad(near[:-1], (1, 0))
    values = score(Clip("a", "synthetic", near + echo, echo, near), filtered, sample_rate=RATE, scorers=())
    assert values["si_sdri_db"] < 3 and values["sdri_db"] > 40


def test_listeners_hear_the_second_half_of_far_end_single_talk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = {}

    def fake(name: str, clip: perceptual.Clip) -> dict[str, float]:
        heard[clip.scenario] = name, len(clip.output), len(clip.mic), len(clip.far)
        if clip.scenario == "near_end":
            raise perceptual.NoScore("too short")
        return {name: 1.0}

    monkeypatch.setattr(perceptual, "score", fake)
    mic = noise(0)
    for kind, clean in {"synthetic": mic, "far_end": None, "near_end": None, "alone": None}.items():
        values = score(Clip(kind, kind, mic, mic, clean), mic, sample_rate=RATE, scorers=("pesq", "aecmos"))
        assert ("aecmos" in values) == (kind == "far_end")
    assert heard == {
        "double_talk": ("pesq", 8000, 8000, 8000),
        "far_end": ("aecmos", 4000, 4000, 4000),
        "near_end": ("aecmos", 8000, 8000, 8000),
    }


def test_an_unknown_kind_of_recording_is_named(in_tmp: Path) -> None:
    write_audio(in_tmp / "a.wav", noise(0), RATE)
    row = {"id": "x1", "kind": "telephone", "mic_filepath": "a.wav", "farend_filepath": "a.wav", "duration": 0.5}
    write_manifest(in_tmp / "m.jsonl", [row])
    with pytest.raises(SystemExit, match="m.jsonl: x1: kind=telephone: none of synthetic doubletalk"):
        read_clips(in_tmp / "m.jsonl", RATE)
