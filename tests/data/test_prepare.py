"""The command line of data.prepare; what it prepares is tested beside each corpus."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from PIL import Image

from data import prepare
from data.manifest import read_manifest


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    for speaker in range(10):
        for take in range(2):
            path = folder / f"speaker{speaker}" / f"{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, np.random.default_rng(take).uniform(-0.5, 0.5, 1600), 16000)
    return folder


def test_manifest_splits_a_folder_by_speaker(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "manifests"
    command = ["manifest", "--input", str(recordings), "--output", str(output), "--test-fraction", "0.3"]
    assert prepare.main(command) == 0
    assert "test.jsonl: 3 speakers, 6 recordings, 0.00 hours" in capsys.readouterr().out
    rows = {split: read_manifest(output / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == 20
    assert prepare.main(["manifest", "--check", "--output", str(output)]) == 0
    assert prepare.main(command) == 0  # the same again
    assert "unchanged" in capsys.readouterr().out
    assert prepare.main([*command, "--seed", "1"]) == 2
    assert "exists and says something else" in capsys.readouterr().err
    assert {split: read_manifest(output / f"{split}.jsonl") for split in rows} == rows


def test_a_split_of_no_speakers_is_not_written(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "manifests"
    assert prepare.main(["manifest", "--input", str(recordings), "--output", str(output), "--val-fraction", "0"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert prepare.main(["manifest", "--check", "--output", str(output)]) == 0


def test_a_file_name_that_is_not_utf8_is_left_out(
    recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (recordings / "speaker3" / "0.wav").rename(recordings / "speaker3" / "\udcff.wav")  # the byte ff, as in Latin-1
    output = tmp_path / "manifests"
    assert prepare.main(["manifest", "--input", str(recordings), "--output", str(output)]) == 0
    assert "speaker3/\\udcff.wav': its name is not UTF-8" in caplog.text
    assert sum(len(read_manifest(path)) for path in output.iterdir()) == 19


def test_manifest_of_some_speakers(recordings: Path, tmp_path: Path) -> None:
    output = tmp_path / "manifests"
    command = ["manifest", "--input", str(recordings), "--output", str(output), "--max-speakers", "6"]
    assert prepare.main(command) == 0
    speakers = [{row["speaker"] for row in read_manifest(path)} for path in sorted(output.iterdir())]
    assert [len(names) for names in speakers] == [2, 2, 2] and len(set.union(*speakers)) == 6
    assert prepare.main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["manifest", "--output", "x"], "error: --input is missing"),
        (["manifest", "--input", "none", "--output", "x"], "error: none: no such folder"),
        (["manifest", "--check", "--output", "none"], "none/train.jsonl: no such manifest"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--jobs", "0"], "argument --jobs: must be 1 or more, got 0"),
        (["demo", "--seed", "x"], "argument --seed: invalid whole number value: 'x'"),
        (["manifest", "--output", "x", "--val-fraction", "1"], "must be from 0 to below 1, got 1"),
        (["none"], "invalid choice: 'none'"),
        ([], "the following arguments are required: corpus"),
    ],
)
def test_argparse_mistakes_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_ten_problems_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prepare, "check_demo", lambda _output: [f"problem {i}" for i in range(14)])
    assert prepare.main(["demo", "--check"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: problem 0" and lines[-1] == "error: and 4 more" and len(lines) == 11


def put_image(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_images_are_split_by_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(16):
        put_image(tmp_path / "mine" / "images" / f"{number}.jpg", (number * 15, 0, 0))
        if number != 3:
            put_image(tmp_path / "mine" / "masks" / f"{number}.png", (255, 255, 255))
    output = tmp_path / "manifests"
    command = ["images", "--input", str(tmp_path / "mine"), "--output", str(output)]
    assert prepare.main(command) == 2
    assert "images/3.jpg: has no mask" in capsys.readouterr().err and not output.exists()
    command += ["--allow-missing-mask", "clean", "--test-fraction", "0.25"]
    assert prepare.main(command) == 0
    printed = capsys.readouterr().out
    assert "test.jsonl: 4 images with masks" in printed and "1 images without marks" in printed
    rows = {split: read_manifest(output / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "val": 2, "test": 4}
    assert prepare.main(command) == 0 and "unchanged" in capsys.readouterr().out
    assert prepare.main(["images", "--check", "--output", str(output)]) == 0

    put_image(tmp_path / "mine" / "masks" / "5.png", (38, 38, 38))
    image = tmp_path / "mine" / "images" / "7.jpg"
    image.write_bytes(image.read_bytes()[:300])
    assert prepare.main(["images", "--check", "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and any("5.png: not a mask" in line for line in lines)
    assert any("7.jpg: " in line for line in lines)


def test_clwd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 10), ("test", 2)):
        for number in range(count):
            for folder, suffix in (("Watermarked_image", "jpg"), ("Watermark_free_image", "jpg"), ("Mask", "png")):
                colour = (255, 255, 255) if folder == "Mask" else (number * 20, 9, 9)  # train and test share photos
                put_image(tmp_path / "CLWD" / split / folder / f"{number}.{suffix}", colour)
    output = tmp_path / "manifests"
    assert prepare.main(["clwd", "--input", str(tmp_path), "--output", str(output), "--val-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        assert f"{split}.jsonl: {count} images with masks" in printed
        assert {row["split"] for row in read_manifest(output / f"{split}.jsonl")} == {split}
    assert prepare.main(["clwd", "--check", "--output", str(output)]) == 0
    assert prepare.main(["clwd", "--input", str(tmp_path / "CLWD" / "test"), "--output", str(output)]) == 2
    assert "looked for train/Watermarked_image in it" in capsys.readouterr().err
