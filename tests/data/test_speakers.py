import numpy as np
import pytest
import soundfile as sf

from data.errors import DataError
from data.speakers import scan_speakers, split_by_speaker, take_hours


def record(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.zeros(int(8000 * seconds)), 8000)


def test_scan_names_speakers_and_leaves_out_what_cannot_be_read(tmp_path, caplog):
    for name in ("anna/1/b.wav", "anna/a.FLAC", "bob-2/x.wav", "carl_07.wav", "dora-1.ogg", ".trash/y.wav"):
        record(tmp_path / name)
    (tmp_path / "anna" / "broken.wav").write_text("no audio")
    (tmp_path / "anna" / "._a.wav").write_text("resource fork")
    (tmp_path / "notes.txt").write_text("")
    rows = scan_speakers(tmp_path)
    assert [(row["audio_filepath"].removeprefix(f"{tmp_path}/"), row["speaker"]) for row in rows] == [
        ("anna/1/b.wav", "anna"),
        ("anna/a.FLAC", "anna"),
        ("bob-2/x.wav", "bob-2"),
        ("carl_07.wav", "carl"),
        ("dora-1.ogg", "dora"),
    ]
    assert rows[0]["duration"] == 0.1
    assert "broken.wav" in caplog.text and "._a" not in caplog.text


def test_scan_of_nothing(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        scan_speakers(tmp_path / "missing")
    with pytest.raises(DataError, match="no recordings"):
        scan_speakers(tmp_path)
    for number in range(12):
        (tmp_path / f"{number}.wav").write_text("bad")
    record(tmp_path / "good.wav")
    with pytest.raises(DataError, match="12 of 13 recordings"):
        scan_speakers(tmp_path)


def rows_of(num_speakers, per_speaker=3):
    return [
        {"audio_filepath": f"/s{speaker}/{number}.wav", "duration": 1.0, "speaker": f"s{speaker}"}
        for speaker in range(num_speakers)
        for number in range(per_speaker)
    ]


def test_split_is_disjoint_complete_and_independent_of_order():
    rows = rows_of(40)
    splits = split_by_speaker(rows, seed=1)
    speakers = {name: {row["speaker"] for row in part} for name, part in splits.items()}
    assert {name: len(names) for name, names in speakers.items()} == {"train": 32, "val": 4, "test": 4}
    assert sum(len(part) for part in splits.values()) == len(rows)
    assert not (speakers["train"] & speakers["val"] | speakers["train"] & speakers["test"])
    again = split_by_speaker(rows[::-1], seed=1)
    assert {row["speaker"] for row in again["test"]} == speakers["test"]
    assert {row["speaker"] for row in split_by_speaker(rows, seed=2)["test"]} != speakers["test"]


def test_each_wanted_split_has_two_speakers():
    splits = split_by_speaker(rows_of(6))
    assert {name: len({row["speaker"] for row in part}) for name, part in splits.items()} == {
        "train": 2,
        "val": 2,
        "test": 2,
    }
    assert split_by_speaker(rows_of(4), test_fraction=0)["test"] == []


def test_split_errors():
    with pytest.raises(DataError, match="5 speaker.s. found, at least 6"):
        split_by_speaker(rows_of(5))
    with pytest.raises(DataError, match="lower the fractions"):
        split_by_speaker(rows_of(10), val_fraction=0.49, test_fraction=0.49)
    with pytest.raises(DataError, match="no speaker given"):
        split_by_speaker([{"audio_filepath": "/a.wav", "duration": 1.0}])
    with pytest.raises(ValueError, match="fraction"):
        split_by_speaker(rows_of(10), val_fraction=0.5, test_fraction=0.5)


def test_some_speakers_are_chosen_by_name_and_seed(tmp_path):
    for name in "abcdefgh":
        record(tmp_path / name / "1.wav")
    chosen = {row["speaker"] for row in scan_speakers(tmp_path, max_speakers=3, without=("a",))}
    assert len(chosen) == 3 and "a" not in chosen
    record(tmp_path / "b" / "0.wav")  # more recordings, the same speakers
    assert {row["speaker"] for row in scan_speakers(tmp_path, max_speakers=3, without=("a",))} == chosen
    others = [scan_speakers(tmp_path, max_speakers=3, without=("a",), seed=seed) for seed in range(1, 6)]
    assert any({row["speaker"] for row in rows} != chosen for rows in others)
    assert len(scan_speakers(tmp_path, max_speakers=99)) == 9


def test_hours_are_shared_among_speakers():
    rows = rows_of(4, per_speaker=10)
    taken = take_hours(rows, max_hours=8.5 / 3600)
    assert len(taken) == 8 and [rows.index(row) for row in taken] == sorted(rows.index(row) for row in taken)
    assert [sum(row["speaker"] == f"s{number}" for row in taken) for number in range(4)] == [2, 2, 2, 2]
    assert take_hours(rows, max_hours=8.5 / 3600) == taken != take_hours(rows, max_hours=8.5 / 3600, seed=1)
    assert take_hours(rows, max_hours=1) == rows
