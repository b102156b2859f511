import json
import logging

import numpy as np
import pytest
import soundfile as sf

from data.errors import DataError, ManifestError
from data.ssl_manifest import duration_s, manifest_paths, read_recordings, within


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("value", ["a.json,b.json", " a.json , b.json,", ["a.json", "b.json"], ("a.json", "b.json")])
def test_several_manifests(value):
    assert manifest_paths("key", value) == ["a.json", "b.json"]


@pytest.mark.parametrize("value", [3, ["a.json", None], "", " , ", []])
def test_no_manifest(value):
    with pytest.raises(DataError, match="model.train_ds.manifest_filepath"):
        manifest_paths("model.train_ds.manifest_filepath", value)


def test_rows_hold_what_is_known_of_them_and_nothing_else(tmp_path):
    rows = [
        {"audio_filepath": "speech/a.wav", "duration": 2, "text": ["not", "text"], "lang": "en", "mix_filepath": 3},
        {"audio_filename": str(tmp_path / "b.wav"), "offset": 0.5, "speaker": 7, "duration": None},
    ]
    manifest = write(tmp_path / "list.json", rows)
    assert read_recordings(manifest) == [
        {"audio_filepath": str(tmp_path / "speech" / "a.wav"), "duration": 2.0, "manifest_line": "list.json, line 1"},
        {
            "audio_filepath": str(tmp_path / "b.wav"),
            "offset": 0.5,
            "speaker": "7",
            "manifest_line": "list.json, line 2",
        },
    ]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"duration": 2.0}, "'audio_filepath' is missing"),
        ({"audio_filepath": "a.wav", "duration": "long"}, "duration must be a number of seconds"),
        ({"audio_filename": 5}, "audio_filepath must be text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, says):
    manifest = write(tmp_path / "list.json", [{"audio_filepath": "a.wav"}, row])
    with pytest.raises(ManifestError, match=f"line 2: .*{says}"):
        read_recordings(manifest)


def test_limits_are_inclusive_and_what_does_not_say_its_duration_stays(caplog):
    rows = [{"duration": seconds} for seconds in (0.9, 1.0, 2.0, 3.0, 3.1)] + [{"audio_filepath": "a.wav"}]
    with caplog.at_level(logging.INFO):
        kept = within(rows, min_duration_s=1.0, max_duration_s=3.0, where="here")
    assert kept == [*rows[1:4], rows[5]]
    (line,) = caplog.messages
    assert line.startswith("here: 2 of 6 recordings are left out (shorter than 1 s or longer than 3 s)")
    assert line.endswith("0.00 hours stay and 1 recordings without duration")
    assert within(rows, min_duration_s=None, max_duration_s=None, where="here") == rows


def test_nothing_left():
    with pytest.raises(DataError, match="here: none of its 1 recordings lasts from 2 to inf s; change min_duration"):
        within([{"duration": 1.0}], min_duration_s=2.0, max_duration_s=None, where="here")


def test_durations_that_are_not_given_stand_in_the_header(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(6000), 4000)
    row = {"audio_filepath": str(tmp_path / "a.wav"), "offset": 0.5}
    assert duration_s(row) == 1.0
    assert duration_s(row | {"duration": 0.25}) == 0.25
    assert duration_s({"audio_filepath": str(tmp_path / "none.wav")}) == 0.0
