"""AISHELL-3 through the command line of data.prepare, on a tiny copy of its layout."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data import prepare
from data.manifest import read_manifest

TRAIN = [f"SSB{number:04d}" for number in range(8)]
TEST = [f"SSB{number:04d}" for number in range(7, 10)]  # SSB0007 is in both


@pytest.fixture
def aishell(tmp_path: Path) -> Path:
    root = tmp_path / "data_aishell3"
    for part, speakers in (("train", TRAIN), ("test", TEST)):
        lines = []
        for speaker in speakers:
            (root / part / "wav" / speaker).mkdir(parents=True)
            for number in range(3):
                name = f"{speaker}{number:04d}.wav"
                sf.write(root / part / "wav" / speaker / name, np.full(8820, 0.1), 44100)
                lines.append(f"{name}\t\u5e7f guang3 \u5dde zhou1 \u5973 nv3")
        (root / part / "content.txt").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")  # one has no text
    facts = "".join(f"{speaker}\tB\tfemale\tnorth\n" for speaker in TRAIN)
    (root / "spk-info.txt").write_text("# AISHELL-3: age group A to D, male or female\n\n" + facts)
    return root


def run(*arguments: object) -> int:
    return prepare.main(["aishell3", *(str(argument) for argument in arguments)])


def speakers_of(folder: Path) -> dict[str, set[str]]:
    return {s: {row["speaker"] for row in read_manifest(folder / f"{s}.jsonl")} for s in ("train", "val", "test")}


def test_splits_texts_and_people(aishell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run("--input", tmp_path, "--output", output, "--val-fraction", 0.3) == 0
    out = capsys.readouterr().out
    assert f"{aishell}: 1 speaker(s) in both train and test, kept in test only: SSB0007\n" in out
    speakers = speakers_of(output)
    assert speakers["test"] == set(TEST) and speakers["train"] | speakers["val"] == set(TRAIN[:-1])
    assert len(speakers["val"]) == 2 and not speakers["val"] & speakers["train"]
    rows = {Path(row["audio_filepath"]).name: row for row in read_manifest(output / "train.jsonl")}
    rows |= {Path(row["audio_filepath"]).name: row for row in read_manifest(output / "val.jsonl")}
    first, second = rows["SSB00000000.wav"], rows["SSB00000001.wav"]
    assert "text" not in first and second["text"] == "\u5e7f\u5dde\u5973" and second["duration"] == 0.2
    assert (first["gender"], first["age_group"]) == ("female", "B")
    assert "gender" not in read_manifest(output / "test.jsonl")[-1]
    assert run("--check", "--output", output) == 0
    capsys.readouterr()
    assert run("--input", aishell, "--output", output, "--val-fraction", 0.3) == 0
    assert capsys.readouterr().out.count("unchanged") == 3


def test_a_part_of_it(aishell: Path, tmp_path: Path) -> None:
    limits = ["--max-speakers", 4, "--max-hours", 1.7 / 3600]
    assert run("--input", aishell, "--output", tmp_path / "out", *limits) == 0
    rows = {split: read_manifest(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert len(rows["train"]) + len(rows["val"]) == 8  # 1.6 s of 0.2 s each
    assert len(rows["test"]) == 8
    assert {split: len(names) for split, names in speakers_of(tmp_path / "out").items()} == {
        "train": 2,
        "val": 2,
        "test": 3,
    }


def test_without_test_and_texts(aishell: Path, tmp_path: Path) -> None:
    (aishell / "test").rename(tmp_path / "elsewhere")
    for name in ("spk-info.txt", "train/content.txt"):
        (aishell / name).unlink()
    assert run("--input", aishell, "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.jsonl", "val.jsonl"]
    assert set(read_manifest(tmp_path / "out" / "val.jsonl")[0]) == {
        "audio_filepath",
        "duration",
        "speaker",
        "manifest_line",
    }


def test_mistakes_are_one_line(aishell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (aishell / "train" / "content.txt").write_bytes("\u5e7f".encode("gbk"))
    for arguments, says in (
        (["--input", aishell / "train" / "wav"], "looked for train/wav in it"),
        (["--input", aishell], "content.txt: not UTF-8 text"),
        (["--input", aishell, "--max-speakers", 3], "3 speaker(s) found, at least 4 are needed"),
        ([], "--input is missing"),
    ):
        if "3 speaker" in says:
            (aishell / "train" / "content.txt").unlink()
        assert run(*arguments, "--output", tmp_path / "out") == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and says in errors[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run("--output", "x", "--max-hours", "0")
    assert "must be above 0" in capsys.readouterr().err
