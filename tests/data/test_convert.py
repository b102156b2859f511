"""Copies at one rate: what they hold, which are made, and what happens when the making is stopped."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data import convert, prepare
from data.audio import audio_info, read_audio, write_audio
from data.manifest import path_keys, read_manifest
from tests.data.challenge import write_challenge


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_challenge(tmp_path_factory.mktemp("challenge"))


def run(source: Path, output: Path, rate: int = 16000) -> int:
    arguments = ["aec_challenge", "--input", source, "--output", output, "--convert", rate]
    return prepare.main([str(argument) for argument in arguments])


def copies(output: Path) -> list[Path]:
    return sorted(output.rglob("*.wav"))


def test_the_copies_are_the_recordings(challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(challenge, tmp_path / "aec") == 0
    assert prepare.main(["aec_challenge", "--input", str(challenge), "--output", str(tmp_path / "as_is")]) == 0
    made = 0
    for manifest in sorted((tmp_path / "aec").glob("*.jsonl")):
        as_they_are = read_manifest(tmp_path / "as_is" / manifest.name)
        for row, own in zip(read_manifest(manifest), as_they_are, strict=True):
            assert {key: row[key] for key in row if key not in path_keys(row)} == {
                key: own[key] for key in own if key not in path_keys(own)
            }
            for key in path_keys(row):
                info = audio_info(row[key])
                assert (info.sample_rate, info.num_channels) == (16000, 1) and sf.info(row[key]).subtype == "PCM_16"
                expected = read_audio(own[key], sample_rate=16000)
                resampled = audio_info(own[key]).sample_rate != 16000
                difference = (read_audio(row[key], sample_rate=16000) - expected).abs().max()
                assert difference <= (0.5 / 32768 if resampled else 0), "16-bit recordings come out bit for bit"
                made += 1
    assert made > 60
    number = len(copies(tmp_path / "aec"))
    assert f"converted_16000/datasets: {number} of {number} files\n" in capsys.readouterr().out
    assert (
        "converted_16000/datasets/real/b0_doubletalk_mic.wav"
        in (tmp_path / "aec" / "train_no_target.jsonl").read_text()
    )
    assert prepare.main(["aec_challenge", "--check", "--output", str(tmp_path / "aec")]) == 0


def test_copies_that_are_no_older_than_their_recording_stay(
    challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = challenge / "real", tmp_path / "aec"
    assert run(source, output) == 0
    paths = copies(output)
    paths[0].unlink()
    os.utime(paths[1], ns=(0, 0))
    before = {path: path.stat().st_mtime_ns for path in paths[1:]}
    capsys.readouterr()
    assert run(source, output) == 0
    assert f"{len(paths)} of {len(paths)} files, {len(paths) - 2} of them were there\n" in capsys.readouterr().out
    assert copies(output) == paths
    assert [path for path in paths[1:] if path.stat().st_mtime_ns != before[path]] == [paths[1]]


def test_what_passes_full_scale_is_kept_as_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = np.sign(np.sin(np.arange(24000) * 0.05))  # rings when it is resampled
    (tmp_path / "real").mkdir()
    for role, samples in (("mic", square), ("lpb", 0.5 * square)):
        sf.write(tmp_path / "real" / f"a_farend_singletalk_{role}.wav", samples, 48000, subtype="PCM_16")
    assert run(tmp_path / "real", tmp_path / "aec") == 0
    assert "2 of 2 files, 1 pass full scale and are 32-bit floats\n" in capsys.readouterr().out
    loopback, mic = copies(tmp_path / "aec")
    assert (sf.info(loopback).subtype, sf.info(mic).subtype) == ("PCM_16", "FLOAT")
    resampled = read_audio(tmp_path / "real" / "a_farend_singletalk_mic.wav", sample_rate=16000)
    assert resampled.abs().max() > 1 and torch.equal(read_audio(mic, sample_rate=16000), resampled)


@pytest.mark.parametrize(("level", "floats"), [(32767 / 32768, False), (1.0, True), (-1.0, False), (-1.0001, True)])
def test_full_scale_to_the_step(tmp_path: Path, level: float, floats: bool) -> None:
    samples = torch.tensor([0.0, level, 0.25])
    assert write_audio(tmp_path / "a.wav", samples, 16000, sixteen_bits=True) == floats
    assert torch.equal(read_audio(tmp_path / "a.wav", sample_rate=16000), samples)


def test_a_stop_leaves_whole_files_and_the_same_command_goes_on(
    challenge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = challenge / "synthetic", tmp_path / "aec"
    assert run(source, tmp_path / "whole") == 0

    real_write, written = sf.write, []

    def stopped(file: Path, *rest: object, **options: object) -> None:
        written.append(file)
        if len(written) == 5:
            file.write_bytes(b"RIFF")
            raise KeyboardInterrupt
        real_write(file, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sf, "write", stopped)
        assert run(source, output) == 130
    assert "the same command starts again" in capsys.readouterr().err
    assert len([path for path in output.rglob("*") if path.is_file()]) == 4
    assert run(source, output) == 0
    assert ", 4 of them were there" in capsys.readouterr().out
    wholes = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in copies(tmp_path / "whole")}
    assert {path.relative_to(output): path.read_bytes() for path in copies(output)} == wholes


def test_a_full_disk_and_recordings_that_cannot_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = write_challenge(tmp_path / "challenge") / "synthetic"
    bad = source / "farend_speech" / "farend_speech_fileid_0.wav"
    samples = np.zeros(8000, np.float32)
    samples[7000] = np.nan
    sf.write(bad, samples, 16000, subtype="FLOAT")
    assert run(source, tmp_path / "aec") == 0
    assert f"left out: {bad}: holds NaN" in caplog.text
    assert not any("fileid_0.wav" in row["mic_filepath"] for row in read_manifest(tmp_path / "aec" / "test.jsonl"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sf, "write", full)
    capsys.readouterr()
    assert run(source, tmp_path / "other") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and ".wav: cannot be written (No space left on device)" in error[0]


def test_progress_is_told(challenge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(convert, "_PROGRESS_S", -1.0)
    assert run(challenge / "synthetic_fullband", tmp_path / "aec") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "synthetic_fullband: " in line]
    number = len(copies(tmp_path / "aec"))
    assert [line.split(": ")[1] for line in lines[:number]] == [f"{n + 1} of {number} files" for n in range(number)]
