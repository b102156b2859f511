import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder

from data.errors import DataError
from data.fonts import PACKAGES, PROBES, FontBook

NAMES = {Path(file).name: file for file in FontBook().files}
ROBOTO = NAMES["Roboto-Regular.ttf"]
NANUM = NAMES["NanumGothic.ttf"]


def placeholder_font(path: Path) -> Path:
    """A font that draws one and the same glyph for every character, as fallback fonts do."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "box"])
    builder.setupCharacterMap({ord(character): "box" for probe in PROBES.values() for character in probe} | {48: "box"})
    builder.save(str(path))
    return path


def test_the_installed_packages_write_all_scripts():
    book = FontBook()
    assert set(book.scripts) == set(PROBES)
    assert len(book.files) == len(set(book.files))
    # Symbols and fallback fonts of matplotlib are not text.
    assert not any(name.startswith(("STIX", "cm", "LastResort")) for name in NAMES)


def test_packages_are_found_without_being_imported():
    for package in set(PACKAGES) - {"matplotlib"}:
        assert FontBook([package]).files
        assert package not in sys.modules


def test_what_a_font_lacks_is_not_covered():
    book = FontBook()
    assert book.covers(ROBOTO, "Sample ©2024 Образец")
    assert not book.covers(ROBOTO, "견본")
    assert not book.covers(ROBOTO, "a견")
    assert book.covers(NANUM, "견본")


@pytest.mark.parametrize("script", PROBES)
def test_only_fonts_that_write_the_script_are_chosen(script):
    book = FontBook()
    rng = np.random.default_rng(0)
    chosen = {book.choose(rng, script) for _ in range(200)}
    assert all(book.covers(font, PROBES[script] + "0123456789") for font in chosen)
    assert {font for font in book.files if book.covers(font, PROBES[script] + "0123456789")} == chosen


def test_the_same_generator_chooses_the_same_fonts_in_a_worker():
    book = FontBook()
    copy = pickle.loads(pickle.dumps(book))
    assert [copy.choose(np.random.default_rng(seed), "latin") for seed in range(20)] == [
        book.choose(np.random.default_rng(seed), "latin") for seed in range(20)
    ]
    assert len(pickle.dumps(book)) < 20_000


def test_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(ROBOTO, tmp_path / "deep" / "one.TTF")
    (tmp_path / "readme.txt").write_text("no font")
    book = FontBook([tmp_path, NANUM, NANUM])
    assert sorted(Path(file).name for file in book.files) == ["NanumGothic.ttf", "one.TTF"]
    assert book.scripts == ("latin", "korean", "cyrillic")


def test_a_script_that_no_font_can_write_is_named():
    with pytest.raises(DataError, match=r"none of the 1 fonts can write korean: add one that can"):
        FontBook([ROBOTO]).choose(np.random.default_rng(0), "korean")


def test_a_font_of_placeholders_is_never_used(tmp_path):
    assert FontBook([placeholder_font(tmp_path / "boxes.ttf")]).scripts == ()


def test_faults_are_one_line_with_the_name(tmp_path):
    (tmp_path / "bad.ttf").write_bytes(b"\x00\x01\x00\x00" + b"no font" * 20)
    (tmp_path / "empty").mkdir()
    for source, words in {
        str(tmp_path / "bad.ttf"): "bad.ttf: not a font",
        str(tmp_path / "empty"): "holds no font",
        "no_such_fonts": "no_such_fonts: no such font file or folder",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            FontBook([source])
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="auto or a list"):
        FontBook(ROBOTO)
    with pytest.raises(DataError, match="no font was found"):
        FontBook([])
