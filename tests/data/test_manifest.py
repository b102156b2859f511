import json

import pytest

from data.errors import ManifestError
from data.manifest import LINE_KEY, is_echo, is_image, place_of, read_manifest, source_keys, write_manifest


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
        "manifest_line": "a.jsonl, line 1",
    }
    assert rows[1] == {
        "audio_filepath": str(tmp_path / "b.wav"),
        "duration": 2.0,
        "offset": 0.5,
        "mix_filepath": str(path.parent / "m"),
        "manifest_line": "a.jsonl, line 2",
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
        (b'{"audio_filepath": "a.wav", "duration": 1}\0', "NUL byte"),
        (b'{"audio_filepath": "a.wav", "duration": 1, "id": [1]}', "id must be text"),
        (b'{"mix_filepath": "m.wav", "s1_filepath": "1.wav", "duration": 1}', "fixed mixture (mix_filepath) in a"),
        (b'{"mix_filepath": "m.wav", "duration": 1}', "'s1_filepath' is missing"),
        (b'{"mic_filepath": "m.wav", "duration": 1, "scenario": "near_end"}', "an echo recording (mic_filepath) in a"),
        (b'{"audio_filepath": "a.wav", "duration": 1, "delay_ms": -1}', "delay_ms must be a number of milliseconds"),
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
    with pytest.raises(ManifestError, match="no such manifest; make it with: python -m data.prepare demo --output"):
        read_manifest(tmp_path / "demo_data" / "train.jsonl")


def test_rows_of_fixed_mixtures(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"mix_filepath": "m.wav", "s1_filepath": "1.wav", "s2_filepath": "/2.wav", "duration": 1, "id": 7}\n'
        '{"mix_filepath": "m", "s1_filepath": "1", "duration": 1, "noise_filepath": "n.wav", "s2_filepath": null}'
    )
    rows = read_manifest(tmp_path / "a.jsonl")
    assert rows[0]["id"] == "7" and rows[0]["s2_filepath"] == "/2.wav"
    assert [source_keys(row) for row in rows] == [["s1_filepath", "s2_filepath"], ["s1_filepath"]]
    assert rows[1]["noise_filepath"] == str(tmp_path / "n.wav")
    assert source_keys({f"s{number}_filepath": "" for number in range(11, 0, -1)})[-1] == "s11_filepath"


@pytest.mark.parametrize(
    "row, says",
    [
        (
            {"audio_filepath": "a.wav", "duration": 1},
            "a talker (audio_filepath) in a manifest that begins with a fixed",
        ),
        (
            {"mix_filepath": "m", "s1_filepath": "1", "s3_filepath": "3", "duration": 1},
            "s3_filepath without all before",
        ),
    ],
)
def test_a_bad_line_among_fixed_mixtures(tmp_path, row, says):
    first = {"mix_filepath": "m.wav", "s1_filepath": "1.wav", "s2_filepath": "2.wav", "duration": 1}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: ") and says in str(error.value)


ECHO = {"mic_filepath": "m.wav", "farend_filepath": "f.wav", "duration": 1, "scenario": "far_end"}


@pytest.mark.parametrize(
    ("kind", "scenario"),
    [
        ("synthetic doubletalk", "double_talk"),
        ("real doubletalk_with_movement", "double_talk"),
        ("real far-end single talk", "far_end"),
        ("farend_singletalk_with_movement", "far_end"),
        ("Near-End Single-Talk", "near_end"),
    ],
)
def test_rows_of_echo_recordings(tmp_path, kind, scenario):
    told = ECHO | {"scenario": None, "kind": kind, "clean_filepath": "c.wav", "delay_ms": 12}
    near = {"mic_filepath": "n.wav", "duration": 1, "scenario": "near_end", "kind": "doubletalk"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (told, near)))
    rows = read_manifest(tmp_path / "a.jsonl")
    assert [row["scenario"] for row in rows] == [scenario, "near_end"] and all(map(is_echo, rows))
    assert rows[0]["farend_filepath"] == str(tmp_path / "f.wav") and rows[0]["delay_ms"] == 12.0
    assert "farend_filepath" not in rows[1] and rows[0]["kind"] == kind


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"farend_filepath": None}, "key 'farend_filepath' is missing; only near_end rows may do without, this is far"),
        ({"mic_filepath": None}, "key 'mic_filepath' is missing"),
        ({"duration": None}, "key 'duration' is missing"),
        (
            {"scenario": None},
            "its scenario is not known: set scenario to one of double_talk, far_end, near_end (or kind",
        ),
        ({"scenario": None, "kind": "sweep"}, "its scenario is not known"),
        ({"scenario": None, "kind": "far-end, then doubletalk"}, "its scenario is not known"),
        ({"scenario": None, "kind": 7}, "its scenario is not known"),
        ({"scenario": "doubletalk"}, 'scenario must be one of double_talk, far_end, near_end, got "doubletalk"'),
        ({"scenario": ["far_end"]}, 'scenario must be one of double_talk, far_end, near_end, got ["far_end"]'),
        ({"delay_ms": "long"}, 'delay_ms must be a number of milliseconds, got "long"'),
        ({"clean_scale": 0}, "clean_scale must be a factor above 0, got 0"),
        ({"clean_scale": -0.5}, "clean_scale must be a factor above 0, got -0.5"),
        ({"clean_scale": "half"}, 'clean_scale must be a factor above 0, got "half"'),
        ({"mic_filepath": None, "farend_filepath": None, "audio_filepath": "a.wav"}, "begins with an echo recording"),
    ],
)
def test_a_bad_line_among_echo_recordings(tmp_path, change, says):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ECHO)}\n{json.dumps(ECHO | change)}\n")
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: ") and says in str(error.value)


def test_echo_recordings_for_prediction_need_neither_scenario_nor_duration(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"mic_filepath": "m.wav"}\n{"mic_filepath": "m.wav", "kind": "nearend"}\n')
    rows = read_manifest(tmp_path / "a.jsonl", required=("mic_filepath",))
    assert "scenario" not in rows[0] and rows[1]["scenario"] == "near_end"


def test_csv_of_echo_recordings(tmp_path):
    (tmp_path / "a.csv").write_text(
        "mic_filepath,farend_filepath,duration,scenario,delay_ms,clean_scale\nm.wav,f.wav,1,far_end,20.5,0.5\n"
    )
    (row,) = read_manifest(tmp_path / "a.csv")
    assert (row["delay_ms"], row["clean_scale"]) == (20.5, 0.5) and row["scenario"] == "far_end"


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv_says_the_same_as_json_lines(tmp_path, bom):
    (tmp_path / "a.CSV").write_text(
        f"{bom}audio_filepath,duration,speaker, text,offset\r\n"
        'é/a.wav,1.50,007,"one, ""two""",\r\n\r\n'
        "/b.wav, 2,008,,0.25\r\n",
        encoding="utf-8",
    )
    assert read_manifest(tmp_path / "a.CSV") == [
        {
            "audio_filepath": str(tmp_path / "é" / "a.wav"),
            "duration": 1.5,
            "speaker": "007",
            "text": 'one, "two"',
            "manifest_line": "a.CSV, line 2",
        },
        {
            "audio_filepath": "/b.wav",
            "duration": 2.0,
            "speaker": "008",
            "offset": 0.25,
            "manifest_line": "a.CSV, line 4",
        },
    ]


HEADER = b"audio_filepath,duration,speaker\n"


@pytest.mark.parametrize(
    "content, line, says",
    [
        (HEADER + b"a.wav,1,x\na.wav,1\n", 3, "2 fields, the header has 3"),
        (HEADER + b"a,b.wav,1,x\n", 2, "4 fields, the header has 3"),
        (HEADER + b"a.wav,long,x\n", 2, 'duration must be a number of seconds, got "long"'),
        (HEADER + b"a.wav,nan,x\n", 2, "duration must be a number of seconds, got NaN"),
        (HEADER + b"a.wav,,x\n", 2, "'duration' is missing (seconds; python -m data.prepare manifest writes it)"),
        (HEADER + b",,\n", 2, "'audio_filepath' is missing"),
        (HEADER + b"a\xff.wav,1,x\n", 2, "not UTF-8"),
        (HEADER + b"a.wav\0,1,x\n", 2, "NUL byte"),
        (HEADER + b'"a.wav,1,x\n', 2, "not valid CSV"),
        (b"audio_filepath,duration,duration\n", 1, "column 'duration' is there twice"),
        (b"audio_filepath,,duration\n", 1, "column 2 has no name"),
        (b"audio_filepath;duration\na.wav;1\n", 1, "separated by commas"),
        (b"file,duration\na.wav,1\n", 2, "'audio_filepath' is missing"),
        (HEADER, None, "the manifest is empty"),
        (b"", None, "the manifest is empty"),
    ],
)
def test_a_bad_line_of_csv_is_named(tmp_path, content, line, says):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    place = f"{path}, line {line}: " if line else f"{path}: "
    assert str(error.value).startswith(place) and says in str(error.value) and "\n" not in str(error.value)


def test_required_keys_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image_filepath": "x.png"}\n')
    rows = read_manifest(tmp_path / "a.jsonl", required=("image_filepath",))
    assert rows == [{"image_filepath": str(tmp_path / "x.png"), LINE_KEY: "a.jsonl, line 1"}]


def test_write_makes_paths_relative_and_read_undoes_it(tmp_path):
    path = tmp_path / "set" / "train.jsonl"
    rows = [
        {"audio_filepath": str(tmp_path / "set" / "é" / "a.wav"), "duration": 1.0, "speaker": "ö"},
        {"audio_filepath": str(tmp_path / "other" / "b.wav"), "duration": 2.0},
    ]
    write_manifest(path, rows)
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["audio_filepath"] for row in stored] == ["é/a.wav", str(tmp_path / "other" / "b.wav")]
    read = read_manifest(path)
    assert [{key: value for key, value in row.items() if key != LINE_KEY} for row in read] == rows
    write_manifest(path, read)
    assert LINE_KEY not in path.read_text(encoding="utf-8")  # it belongs to the file that was read
    assert read_manifest(path) == read
    write_manifest(path, [{"audio_filepath": "é/../c.wav", "duration": 1.0}])
    assert read_manifest(path)[0]["audio_filepath"] == str(tmp_path / "set" / "c.wav")
    assert [entry.name for entry in path.parent.iterdir()] == ["train.jsonl"]


def test_rows_of_images(tmp_path):
    rows = [
        {"image_filepath": "a.jpg"},
        {"image_filepath": "a.jpg", "mask_filepath": "m/a.png", "source": 7, "split": "val", "marked": True},
        {"image_filepath": "/b.jpg", "clean_filepath": "c/b.png", "mask_filepath": None},
        {"image_filepath": "c.jpg", "marked": False},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_manifest(tmp_path / "a.jsonl")
    assert all(map(is_image, read))
    assert read[1]["mask_filepath"] == str(tmp_path / "m" / "a.png") and read[1]["source"] == "7"
    assert "mask_filepath" not in read[2] and read[3]["marked"] is False
    assert place_of(read[0]) == f"a.jsonl, line 1: {tmp_path / 'a.jpg'}"

    (tmp_path / "a.csv").write_text(
        "image_filepath,mask_filepath,marked,source,split\na.jpg,,False,7,\nb.jpg,b.png,true,8,test\nc.jpg,,,,\n"
    )
    unmarked, marked, photo = read_manifest(tmp_path / "a.csv")
    assert unmarked["marked"] is False and unmarked["source"] == "7" and "split" not in unmarked
    assert marked["marked"] is True and marked["split"] == "test"
    assert photo == {"image_filepath": str(tmp_path / "c.jpg"), LINE_KEY: "a.csv, line 4"}


@pytest.mark.parametrize(
    "more, says",
    [
        ({"mask_filepath": "m.png", "marked": False}, "marked is false, but mask_filepath says where its marks are"),
        ({"clean_filepath": "m.png", "marked": False}, "marked is false, but clean_filepath says where its marks are"),
        ({"mask_filepath": "m.png", "clean_filepath": "c.png"}, "mask_filepath and clean_filepath both say"),
        ({"marked": True}, "marked is true, but nothing says where its marks are"),
        ({"marked": 0}, "marked must be true or false, got 0"),
        ({"split": "dev"}, 'split must be one of train, val, test, got "dev"'),
        ({"split": ["val"]}, 'split must be one of train, val, test, got ["val"]'),
        ({"source": True}, "source must be text, got true"),
        ({"image_filepath": None, "mask_filepath": "m.png"}, "key 'image_filepath' is missing"),
        ({"image_filepath": None, "audio_filepath": "a.wav", "duration": 1}, "a talker (audio_filepath) in a manifest"),
    ],
)
def test_a_bad_line_among_images(tmp_path, more, says):
    (tmp_path / "a.jsonl").write_text('{"image_filepath": "a.jpg"}\n' + json.dumps({"image_filepath": "b.jpg"} | more))
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: ") and says in str(error.value)


def test_marked_in_a_csv_file_is_true_or_false(tmp_path):
    (tmp_path / "a.csv").write_text("image_filepath,marked\na.jpg,no\n")
    with pytest.raises(ManifestError, match=r'line 2: marked must be true or false, got "no"'):
        read_manifest(tmp_path / "a.csv")
