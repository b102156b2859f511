import json

import numpy as np
import pytest
import soundfile as sf

from data.errors import DataError, ManifestError
from data.manifest import read_manifest, scan_speakers, split_by_speaker, write_manifest


def record(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.zeros(int(8000 * seconds)), 8000)


def test_paths_are_relative_to_the_manifest(tmp_path):
    path = tmp_path / "lists" / "a.jsonl"
    path.parent.mkdir()
    lines = [
        {"audio_filepath": "../speech/a.wav", "duration": 1.5, "speaker": 7, "note": [1]},
        {"audio_filepath": str(tmp_path / "b.wav"), "duration": 2, "offset": 0.5, "text": None, "mix_filepath": "m"},
    ]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    rows = read_manifest(path)
    assert rows[0] == {
        "audio_filepath": str(tmp_path / "speech" / "a.wav"),
        "duration": 1.5,
        "speaker": "7",
        "note": [1],
    }
    assert rows[1] == {
        "audio_filepath": str(tmp_path / "b.wav"),
        "duration": 2.0,
        "offset": 0.5,
        "mix_filepath": str(path.parent / "m"),
    }


GOOD = '{"audio_filepath": "a.wav", "duration": 1.0}'


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"audio_filepath": "a.wav"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a.wav", 1.0]', "object"),
        (b'{"duration": 1.0}', "'audio_filepath' is missing"),
        (b'{"audio_filepath": "a.wav"}', "'duration' is missing"),
        (b'{"audio_filepath": "a.wav", "duration": null}', "'duration' is missing"),
        (b'{"audio_filepath": 3, "duration": 1.0}', "audio_filepath must be text"),
        (b'{"audio_filepath": "", "duration": 1.0}', "audio_filepath must be text"),
        (b'{"audio_filepath": "a\\u0000.wav", "duration": 1.0}', "no file name"),
        (b'{"audio_filepath": "a\\ud800.wav", "duration": 1.0}', "no file name"),
        (b'{"audio_filepath": "a.wav", "duration": "long"}', "duration must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": 0}', "duration must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": true}', "duration must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": NaN}', "duration must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": 1' + b"0" * 400 + b"}", "duration must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": 1, "offset": -1}', "offset must be a number"),
        (b'{"audio_filepath": "a.wav", "duration": 1, "speaker": ["x"]}', "speaker must be text"),
        (b'{"audio_filepath": "\xff.wav", "duration": 1}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ") and says in message and "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_a_manifest_that_is_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in (("missing.jsonl", "no such manifest"), ("", "is a folder"), ("empty.jsonl", "is empty")):
        with pytest.raises(ManifestError, match=says):
            read_manifest(tmp_path / name)


def test_required_keys_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image_filepath": "x.png"}\n')
    rows = read_manifest(tmp_path / "a.jsonl", required=("image_filepath",))
    assert rows == [{"image_filepath": str(tmp_path / "x.png")}]


def test_write_makes_paths_relative_and_read_undoes_it(tmp_path):
    path = tmp_path / "set" / "train.jsonl"
    rows = [
        {"audio_filepath": str(tmp_path / "set" / "é" / "a.wav"), "duration": 1.0, "speaker": "ö"},
        {"audio_filepath": str(tmp_path / "other" / "b.wav"), "duration": 2.0},
    ]
    write_manifest(path, rows)
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["audio_filepath"] for row in stored] == ["é/a.wav", str(tmp_path / "other" / "b.wav")]
    assert read_manifest(path) == rows
    write_manifest(path, [{"audio_filepath": "é/../c.wav", "duration": 1.0}])
    assert read_manifest(path)[0]["audio_filepath"] == str(tmp_path / "set" / "c.wav")
    assert [entry.name for entry in path.parent.iterdir()] == ["train.jsonl"]


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
