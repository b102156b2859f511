"""The photos of the wheels: copied as they are, once, with fixed splits."""

import importlib.util
from pathlib import Path

import pytest

from data import prepare
from data.demo_photos import PHOTOS, make_demo_photos
from data.errors import DataError
from data.images import read_image
from data.manifest import read_manifest


def test_the_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo_photos"
    command = ["demo_photos", "--output", str(output)]
    assert prepare.main(command) == 0 and prepare.main([*command, "--check"]) == 0
    splits = {split: read_manifest(output / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 14, "val": 3, "test": 3}
    sources = [{row["source"] for row in rows} for rows in splits.values()]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 19  # two are of one motorcycle
    for rows in splits.values():
        for row in rows:
            assert min(read_image(row["image_filepath"]).shape[:2]) >= 172
    terms = (output / "LICENSES.txt").read_text()
    assert len(terms.splitlines()) == len(PHOTOS) and "coffee.png: from the scikit-image wheel; CC0" in terms

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert prepare.main(command) == 0
    assert "complete (20 photos), nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    (output / "photos" / "coffee.png").write_bytes(b"")
    assert prepare.main([*command, "--check"]) == 2
    assert "coffee.png: has 0 bytes instead of 466706" in capsys.readouterr().err
    assert prepare.main(command) == 0 and prepare.main([*command, "--check"]) == 0


def test_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(DataError, match=r"^scikit-image is not installed, .*pip install -r requirements-demo\.txt$"):
        make_demo_photos(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_version_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_loader("skimage", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    spec.submodule_search_locations.append(str(tmp_path))
    with pytest.raises(DataError, match=r"astronaut\.png: no such photo in this version of scikit-image"):
        make_demo_photos(tmp_path / "new")


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    assert prepare.main(["demo_photos", "--check", "--output", str(tmp_path)]) == 2
    assert "no demo photos here; make them with" in capsys.readouterr().err
    assert prepare.main(["demo_photos", "--output", str(tmp_path)]) == 2
    assert "exists and is not part of a corpus" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine"
