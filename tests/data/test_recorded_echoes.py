"""Recorded echoes in made examples: the recording's own echo and far end, in step, at the levels asked for."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data.aec import EchoData
from data.bad_files import BadFiles, ResilientDataset
from data.echo_levels import level_ratio_db
from data.echo_scenarios import SCENARIOS
from data.errors import AudioError, DataError
from data.manifest import read_manifest, write_manifest
from data.recorded_echoes import RecordedEchoes

RATE = 8000
ONLY = {name: {name: 1.0} for name in SCENARIOS}


def sound(path: Path, samples: np.ndarray) -> str:
    sf.write(path, samples, RATE, subtype="FLOAT")
    return path.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Manifests of three talkers, of a noise, and of two recorded echoes of 1 s: the far end squared, 10 ms later."""
    rng = np.random.default_rng(0)
    talkers = [
        {
            "audio_filepath": sound(tmp_path / f"talker{n}.wav", 0.1 * rng.standard_normal(RATE)),
            "duration": 1.0,
            "speaker": f"s{n}",
        }
        for n in range(3)
    ]
    write_manifest(tmp_path / "talkers.jsonl", talkers)
    noise = sound(tmp_path / "noise.wav", 0.01 * rng.standard_normal(RATE))
    write_manifest(tmp_path / "noise.jsonl", [{"audio_filepath": noise, "duration": 1.0}])
    write_recordings(tmp_path, seconds=1.0)
    return tmp_path


def write_recordings(folder: Path, *, seconds: float, **changes: object) -> None:
    rows = []
    for number in range(2):
        far = 0.1 * np.random.default_rng(10 + number).standard_normal(round(seconds * RATE))
        files = {
            "mic_filepath": sound(folder / f"{number}_mic.wav", np.concatenate([np.zeros(80), far[:-80] ** 2])),
            "farend_filepath": sound(folder / f"{number}_lpb.wav", far),
        }
        rows.append({"id": f"device{number}", "scenario": "far_end", "duration": seconds, **files} | changes)
    write_manifest(folder / "far_end.jsonl", rows)


def data_of(folder: Path, stage: str = "train", **options: object) -> EchoData:
    defaults = {
        "sample_rate": RATE,
        "segment_s": 0.5,
        "eval_segment_s": 0.5,
        "num_rooms": 1,
        "t60_s": (0.1, 0.15),
        "clip_p": 0.0,
        "noise_p": 0.0,
        "recorded_echo_p": 1.0,
        ("" if stage == "train" else f"{stage}_") + "recorded_echo_manifest": str(folder / "far_end.jsonl"),
        "loader": {"num_workers": 0},
    }
    manifests = {f"{part}_manifest": str(folder / "talkers.jsonl") for part in ("train", "val", "test")}
    return EchoData(**manifests, **(defaults | options))


def same(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] if key == "name" else torch.equal(one[key], other[key]) for key in one)


def proportional(signal: torch.Tensor, whole: torch.Tensor) -> tuple[int, float]:
    """Where in a recording a signal is, and by what it was multiplied. Every sample must agree."""
    windows = whole.unfold(0, len(signal), 1)  # (starts, T)
    start = int(((windows @ signal) / windows.norm(dim=1).clamp(min=1e-9)).argmax())
    gain = float(signal.norm() / windows[start].norm())
    torch.testing.assert_close(signal, gain * windows[start], rtol=1e-4, atol=1e-6)
    return start, gain


@pytest.mark.parametrize("scenario", ["double_talk", "far_end"])
def test_echo_and_far_end_are_those_of_one_recording_at_one_place(folder: Path, scenario: str) -> None:
    data = data_of(folder, scenario_weights=ONLY[scenario], ser_db=(-3, 5), noise_manifest=str(folder / "noise.jsonl"))
    noisy = data_of(folder, scenario_weights=ONLY[scenario], noise_manifest=str(folder / "noise.jsonl"), noise_p=1.0)
    starts, devices = set(), set()
    for index in range(6):
        item = data.dataset("train")[index]
        device = next(number for number in range(2) if f"device{number}" in item["name"])
        mic, far = (
            torch.from_numpy(sf.read(folder / f"{device}_{role}.wav", dtype="float32")[0]) for role in ("mic", "lpb")
        )
        start, _ = proportional(item["echo"], mic)
        assert proportional(item["far"], far)[0] == start
        starts.add(start)
        devices.add(device)
        assert item["delay_samples"] == -1 and item["path_change_sample"] == -1 and item["has_target"]
        with_noise = noisy.dataset("train")[index]
        assert with_noise["noise"].any()
        for example in (item, with_noise):
            assert torch.equal(example["mic"], example["near"] + example["echo"] + example["noise"])
        if scenario == "far_end":
            assert not item["near"].any() and not item["target"].any()
        else:
            assert item["name"].startswith("double_talk_s") and torch.equal(item["target"], item["near"])
            ratio_db = level_ratio_db(item["near"].numpy(), item["echo"].numpy())
            assert ratio_db == pytest.approx(float(item["ser_db"]), abs=1e-3) and -3.01 < ratio_db < 5.01
    assert len(starts) > 4 and devices == {0, 1}


def test_the_others_are_what_they_are_without_recordings(folder: Path) -> None:
    plain = data_of(folder, recorded_echo_manifest=None).dataset("train")
    never = data_of(folder, recorded_echo_p=0.0).dataset("train")
    some = data_of(folder, recorded_echo_p=0.5).dataset("train")
    assert all(same(plain[index], never[index]) for index in range(8))
    recorded = [index for index in range(40) if "device" in some[index]["name"]]
    assert 8 < len(recorded) < 24
    for index in range(40):
        item, before = some[index], plain[index]
        assert item["scenario"] == before["scenario"]
        if SCENARIOS[item["scenario"]] == "near_end":
            assert index not in recorded
        if index not in recorded:
            assert same(item, before)
        else:  # the near end is the same talker, part and room: only the common gain differs
            gain = item["near"].norm() / before["near"].norm().clamp(min=1e-9)
            torch.testing.assert_close(item["near"], gain * before["near"], atol=1e-5, rtol=1e-4)
    assert same(some[recorded[0], 3], data_of(folder, recorded_echo_p=0.5).dataset("train")[recorded[0], 3])


def test_each_stage_has_recordings_of_its_own_or_none(folder: Path) -> None:
    for stage in ("train", "val", "test"):
        data = data_of(folder, stage)
        for other in ("train", "val", "test"):
            assert (data.dataset(other).recorded is not None) == (other == stage)


def test_a_short_recording_ends_in_silence_and_a_silent_part_is_drawn_again(folder: Path) -> None:
    write_recordings(folder, seconds=0.3)
    item = data_of(folder, scenario_weights=ONLY["far_end"]).dataset("train")[0]
    assert item["mic"].shape == (4000,) and item["echo"][100:2400].any() and not item["echo"][2400:].any()
    rows = read_manifest(folder / "far_end.jsonl")[:1]
    for key in ("mic_filepath", "farend_filepath"):
        samples = np.zeros(4 * RATE)
        samples[2 * RATE :] = 0.1 * np.random.default_rng(3).standard_normal(2 * RATE)
        sf.write(rows[0][key], samples, RATE)
    echoes = RecordedEchoes([rows[0] | {"duration": 4.0}], sample_rate=RATE)
    silent = [not echoes.draw(np.random.default_rng(seed), 1600).far.any() for seed in range(40)]
    assert sum(silent) < 8, "a half of the parts is silent, a sixteenth of four in a row"


def test_what_is_no_recorded_echo_is_named(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"talkers\.jsonl, line 1: \S*talker0\.wav: no recorded echo; a row needs mic_fil"
    ):
        data_of(folder, recorded_echo_manifest=str(folder / "talkers.jsonl")).dataset("train")
    write_recordings(folder, seconds=1.0, scenario="double_talk")
    with pytest.raises(
        DataError, match=r"far_end\.jsonl, line 1: \S*0_mic\.wav: is double_talk; recorded echoes are far"
    ):
        data_of(folder).dataset("train")
    with pytest.raises(ValueError, match="val_recorded_echo_manifest must be the path of a manifest"):
        data_of(folder, val_recorded_echo_manifest=7)
    with pytest.raises(ValueError, match="recorded_echo_p"):
        data_of(folder, recorded_echo_p=1.5)


def test_a_bad_recording_gives_way_to_the_next_example(folder: Path) -> None:
    (folder / "0_lpb.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    dataset = data_of(folder, scenario_weights=ONLY["far_end"]).dataset("train")
    failing = []
    for index in range(8):
        try:
            dataset[index]
        except AudioError as error:
            assert "0_lpb.wav: is a Git-LFS pointer" in str(error)
            failing.append(index)
    assert 0 < len(failing) < 8
    item, messages = ResilientDataset(dataset, BadFiles())[failing[0], 0]
    assert "device1" in item["name"] and messages
