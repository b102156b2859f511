"""What `input=` stands for, and what the results are called."""

from pathlib import Path

import pytest

from data.errors import ManifestError
from data.manifest import write_manifest
from launch.errors import ConfigError
from launch.inputs import Input, list_inputs, output_names


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    for name in (
        "b/x.wav",
        "a/x.flac",
        "x.wav",
        "x.FLAC",
        "notes.txt",
        ".hidden/y.wav",
        "._x.wav",
        "out/x_source1.wav",
    ):
        (in_tmp / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (in_tmp / "in" / name).touch()
    (in_tmp / "in" / "folder.wav").mkdir()
    return Path("in")


def names(where: str, output: str = "elsewhere") -> list[str]:
    return output_names(list_inputs(where, "audio", Path(output)))


def test_a_folder_keeps_its_structure(folder: Path) -> None:
    assert names("in", "in/out") == ["a/x", "b/x", "x_FLAC", "x_wav"]
    assert "out/x_source1" in names("in", "in") and "a/x" in names("in", ".")


def test_a_glob_keeps_what_its_wildcards_stand_for(folder: Path) -> None:
    assert names("in/*/x.*") == [
        "a/x",
        "b/x",
    ] and names("in/b/*.wav") == ["x"]
    assert names(str(folder.resolve() / "**/x.wav")) == ["b/x", "x"]


def test_a_file_is_called_by_its_name(folder: Path) -> None:
    assert list_inputs("in/b/x.wav", "audio", Path("out")) == [Input(Path("in/b/x.wav"), "x")]


def test_manifests_of_recordings_and_of_mixtures(folder: Path) -> None:
    parts = [{"offset": 1.5, "duration": 2.0}, {"offset": 4.0, "duration": 1.0}]
    rows = [{"audio_filepath": "in/b/x.wav", **part} for part in (*parts, parts[0])]
    write_manifest("parts.jsonl", rows)
    file = folder.resolve() / "b/x.wav"
    expected = [Input(file, "x_1.5s", 1.5, 2.0), Input(file, "x_4s", 4.0, 1.0)]
    assert list_inputs("parts.jsonl", "audio", Path("out")) == expected, "each once"
    mixtures = [
        {"mix_filepath": f"in/{name}", "s1_filepath": "in/x.wav", "duration": 1.0} for name in ("a/x.flac", "b/x.wav")
    ]
    write_manifest("mixtures.jsonl", mixtures)
    assert names("mixtures.jsonl") == ["a/x", "b/x"]
    write_manifest("echo.jsonl", [{"mic_filepath": "in/b/x.wav", "farend_filepath": "in/x.wav"}])
    assert list_inputs("echo.jsonl", "audio", Path("out")) == [Input(file, "x")]
    far = list_inputs("echo.jsonl", "audio", Path("out"), row_key="farend_filepath")
    assert far == [Input(folder.resolve() / "x.wav", "x")]
    for name in ("a.jpg", "b.PNG", "c.wav"):
        (folder / name).touch()
    write_manifest("images.jsonl", [{"image_filepath": "in/a.jpg", "source": "sea"}, {"image_filepath": "in/b.PNG"}])
    assert [i.name for i in list_inputs("images.jsonl", "image", Path("out"))] == ["a", "b"]
    assert [i.name for i in list_inputs("in", "image", Path("out"))] == ["a", "b"]
    with pytest.raises(ManifestError, match="mixtures.jsonl, line 1: key 'image_filepath' is missing"):
        list_inputs("mixtures.jsonl", "image", Path("out"))
    Path("neither.jsonl").write_text('{"image_filepath": "in/x.wav"}\n')
    with pytest.raises(ManifestError, match="neither.jsonl, line 1: .*audio_filepath"):
        names("neither.jsonl")


def test_nothing_found_and_names_that_cannot_be_told_apart(folder: Path) -> None:
    for where in ("nowhere", "in/*.mp3", "in/.hidden/z"):
        with pytest.raises(ConfigError, match=r"no audio file there \(.flac"):
            names(where)
    same = [Input(Path("a/x.wav"), "x"), Input(Path("b/x.wav"), "x")]
    with pytest.raises(ConfigError, match="would be written as x_wav"):
        output_names(same)
