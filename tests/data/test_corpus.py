"""The description of a prepared corpus and the check of its manifests."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.corpus import begin_corpus, check_splits, finish_corpus, is_finished, read_corpus
from data.manifest import write_manifest

MADE_BY = {"corpus": "test", "format": 1, "sizes": (1, 2)}


def make_splits(folder: Path, **changes: object) -> dict[str, list[dict]]:
    """Three splits of one recording of 0.5 s each; `changes` go into the row of the test split."""
    splits = {}
    for split in ("train", "val", "test"):
        path = folder / "audio" / f"{split}.flac"
        path.parent.mkdir(exist_ok=True)
        sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 16000)
        row = {"audio_filepath": f"audio/{split}.flac", "duration": 0.5, "speaker": f"speaker of {split}"}
        splits[split] = [row | (changes if split == "test" else {})]
        write_manifest(folder / f"{split}.jsonl", splits[split])
    return splits


def test_description_is_unfinished_until_the_end(tmp_path: Path) -> None:
    begin_corpus(tmp_path, made_by=MADE_BY, planned=["a/1.txt", "a/2.txt"])
    assert not read_corpus(tmp_path).complete and not is_finished(tmp_path, made_by=MADE_BY)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("one")
    finish_corpus(tmp_path, made_by=MADE_BY, planned=["a/1.txt", "a/2.txt"])
    assert read_corpus(tmp_path).files == {"a/1.txt": 3}
    assert is_finished(tmp_path, made_by=MADE_BY) and not is_finished(tmp_path, made_by=MADE_BY | {"format": 2})
    (tmp_path / "a" / "1.txt").write_text("on")
    assert not is_finished(tmp_path, made_by=MADE_BY)


def test_a_description_cannot_remove_files_elsewhere(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "outside.txt"
    corpus.mkdir()
    outside.write_text("keep me")
    (corpus / "old.txt").write_text("replaced")
    files = {"../outside.txt": 7, str(outside): 7, "old.txt": 8}
    (corpus / "corpus.json").write_text(json.dumps({"made_by": {}, "complete": True, "files": files}))
    begin_corpus(corpus, made_by=MADE_BY, planned=[])
    assert outside.exists() and not (corpus / "old.txt").exists()


def test_good_splits_have_no_problems(tmp_path: Path) -> None:
    make_splits(tmp_path)
    assert check_splits(tmp_path) == []
    (tmp_path / "train.jsonl").unlink()  # a corpus may consist of a test split
    (tmp_path / "val.jsonl").unlink()
    assert check_splits(tmp_path) == []
    (tmp_path / "test.jsonl").unlink()
    assert check_splits(tmp_path) == [f"{tmp_path}/train.jsonl: no such manifest; check the path"]


def test_two_splits_may_share_owners(tmp_path: Path) -> None:
    make_splits(tmp_path, speaker="speaker of train")
    assert len(check_splits(tmp_path, shared=("train", "val"))) == 1
    assert check_splits(tmp_path, shared=("train", "test")) == []
    make_splits(tmp_path, speaker="speaker of train", audio_filepath="audio/train.flac")
    assert len(check_splits(tmp_path, shared=("train", "test"))) == 1  # the recording, not the speaker


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"speaker": "speaker of train"}, "test.jsonl: speaker of train is also in train.jsonl"),
        ({"audio_filepath": "audio/val.flac"}, "val.flac is also in val.jsonl"),
        ({"audio_filepath": "audio/none.flac"}, "none.flac: no such file"),
        ({"duration": 0.7}, "test.flac: lasts 0.50 s, its manifest says 0.70 s"),
        ({"duration": 0.3}, "test.flac: lasts 0.50 s, its manifest says 0.30 s"),
        ({"duration": 0.3, "offset": 0.3}, "test.flac: lasts 0.50 s, its manifest says 0.60 s"),
    ],
)
def test_each_problem_is_found(tmp_path: Path, changes: dict, problem: str) -> None:
    make_splits(tmp_path, **changes)
    problems = check_splits(tmp_path)
    assert len(problems) == 1 and problem in problems[0]


def test_part_of_a_recording_is_no_problem(tmp_path: Path) -> None:
    make_splits(tmp_path, duration=0.2, offset=0.1)
    assert check_splits(tmp_path) == []


def test_cut_off_file_is_found(tmp_path: Path) -> None:
    make_splits(tmp_path)
    path = tmp_path / "audio" / "val.flac"
    path.write_bytes(path.read_bytes()[:-3000])
    assert len(check_splits(tmp_path)) == 1


def make_mixtures(folder: Path, count: int, **noise: float) -> list[dict]:
    """Fixed mixtures of 0.1 s in 16 bits, which name a noise file of that level if one is given."""
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        signals = {name: rng.uniform(-0.2, 0.2, 800) for name in ("s1", "s2")}
        signals |= {name: rng.uniform(-level, level, 800) for name, level in noise.items()}
        signals["mix"] = sum(signals.values())
        for name, samples in signals.items():
            sf.write(folder / "audio" / f"{number}_{name}.wav", samples, 8000)
        rows.append({f"{name}_filepath": f"audio/{number}_{name}.wav" for name in signals} | {"duration": 0.1})
    write_manifest(folder / "test.jsonl", rows)
    return rows


@pytest.mark.parametrize("noise", [{}, {"noise": 0.1}])
def test_mixtures_must_add_up(tmp_path: Path, noise: dict) -> None:
    rows = make_mixtures(tmp_path, 3, **noise)
    assert check_splits(tmp_path) == []
    samples, _ = sf.read(tmp_path / rows[1]["s2_filepath"])
    samples[400] += 8 / 32768  # more than rounding can explain
    sf.write(tmp_path / rows[1]["s2_filepath"], samples, 8000)
    problems = check_splits(tmp_path)
    assert len(problems) == 1 and "1_mix.wav: differs by up to 0.0002" in problems[0]
    sf.write(tmp_path / rows[1]["s2_filepath"], samples[:790], 8000)
    assert "1_s2.wav: its length differs" in check_splits(tmp_path)[0]
    (tmp_path / rows[1]["s2_filepath"]).write_bytes(b"")
    problems = check_splits(tmp_path)
    assert len(problems) == 1 and "1_s2.wav: is empty" in problems[0]
    (tmp_path / rows[1]["s2_filepath"]).unlink()
    if noise:
        write_manifest(
            tmp_path / "test.jsonl",
            [{key: value for key, value in row.items() if key != "noise_filepath"} for row in rows[:1]],
        )
        assert "0_mix.wav: differs by up to 0.1" in check_splits(tmp_path)[0]


def test_of_many_mixtures_some_are_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.corpus._MAX_SUMS", 3)
    rows = make_mixtures(tmp_path, 7)
    for row in rows:
        row["s1_filepath"], row["s2_filepath"] = row["s1_filepath"], row["s1_filepath"]
    write_manifest(tmp_path / "test.jsonl", rows)
    problems = check_splits(tmp_path)
    assert [problem.partition(": ")[0][-9:] for problem in problems] == ["0_mix.wav", "2_mix.wav", "4_mix.wav"]
    assert capsys.readouterr().out == f"{tmp_path}/test.jsonl: 3 of 7 mixtures are added up\n"


@pytest.mark.parametrize(
    ("mic", "far", "more", "problem"),
    [
        ((8000, 16000), (8160, 16000), {}, None),
        ((8000, 16000), (24000, 48000), {}, "far.wav: 48000 Hz, but "),
        ((8000, 16000), (9000, 16000), {}, "far.wav: lasts 0.56 s, its manifest says 0.50 s"),
        ((8200, 16000), (7800, 16000), {}, "far.wav: 0.49 s (7800 samples), but "),  # each near enough to what is said
        ((9600, 16000), (32000, 16000), {"offset": 0.1}, None),
        ((8000, 16000), None, {}, "far.wav: no such file"),
    ],
)
def test_files_of_an_echo_recording_belong_together(tmp_path: Path, mic, far, more: dict, problem: str | None) -> None:
    for name, extent in (("mic", mic), ("far", far)):
        if extent:
            sf.write(tmp_path / f"{name}.wav", np.full(extent[0], 0.1), extent[1])
    row = {"mic_filepath": "mic.wav", "farend_filepath": "far.wav", "duration": 0.5, "kind": "real farend singletalk"}
    write_manifest(tmp_path / "test.jsonl", [row | more])
    problems = check_splits(tmp_path)
    assert len(problems) == (problem is not None)
    assert not problem or problem in problems[0]
