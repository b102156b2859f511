import re
import unicodedata

import numpy as np
import pytest

from data.mark_texts import KINDS, SCRIPTS, draw_text

ALPHABETS = {
    "latin": ("LATIN",),
    "chinese": ("CJK UNIFIED",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK UNIFIED"),
    "korean": ("HANGUL",),
    "cyrillic": ("CYRILLIC",),
}


def texts(script, kind=None, count=200):
    rng = np.random.default_rng(3)
    return [draw_text(rng, script, kind=kind)[0] for _ in range(count)]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_short_single_lines(script, kind):
    drawn = texts(script, kind)
    assert all(text and text == text.strip() and text.isprintable() for text in drawn)
    assert max(map(len, drawn)) <= 50
    assert len(set(drawn)) > 20


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["words", "random"])
def test_letters_are_of_the_script(script, kind):
    letters = {character for text in texts(script, kind) for character in text if character.isalpha()}
    names = {letter: unicodedata.name(letter).replace("KATAKANA-HIRAGANA", "KATAKANA") for letter in letters}
    assert [letter for letter, name in names.items() if not name.startswith(ALPHABETS[script])] == []


def test_kinds_look_like_what_they_are():
    for text in texts("latin", "digits"):
        assert re.search(r"\d{3}", text)
    assert all(re.search(r"@|\.", text) for text in texts("korean", "url"))
    assert any("年" in text for text in texts("chinese", "date"))
    assert all(re.search("©|®|\\(c\\)", text) for text in texts("cyrillic", "copyright"))


def test_kinds_come_in_their_shares():
    rng = np.random.default_rng(0)
    kinds = [draw_text(rng, "latin")[1] for _ in range(600)]
    assert all(abs(kinds.count(kind) / 600 - share) < 0.06 for kind, share in KINDS.items())


def test_the_same_generator_gives_the_same_text():
    assert texts("japanese") == texts("japanese")


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="script must be one of latin"):
        draw_text(np.random.default_rng(0), "klingon")
    with pytest.raises(ValueError, match="kind must be one of words"):
        draw_text(np.random.default_rng(0), "latin", kind="poem")
