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
    (tmp_path / "val.jsonl").unlink()  # val and test are optional
    assert check_splits(tmp_path) == []
    (tmp_path / "train.jsonl").unlink()
    assert len(check_splits(tmp_path)) == 1


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
