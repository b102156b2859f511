"""AISHELL-3, the Mandarin corpus of many talkers, as it is unpacked.

data_aishell3/{train,test}/wav/<speaker>/<speaker><number>.wav    44.1 kHz
data_aishell3/{train,test}/content.txt   "SSB00050001.wav<tab>广 guang3 州 zhou1 女 nv3", optional
data_aishell3/spk-info.txt               "SSB0005<tab>B<tab>female<tab>north", optional
"""

import re
from pathlib import Path
from typing import Any

from data.audio import PathLike
from data.errors import DataError
from data.folders import find_folder
from data.speakers import scan_speakers, split_by_speaker, take_hours

Row = dict[str, Any]

_PINYIN = re.compile(r"[a-zü:]+\d", re.IGNORECASE)
_GENDERS = ("female", "male")
_AGE_GROUPS = ("A", "B", "C", "D")  # below 14, 14 to 25, 26 to 40, above 40 years


def aishell3(
    root: PathLike,
    *,
    max_speakers: int | None = None,
    max_hours: float | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """Rows of train, val and test with text, gender and age group where they are given.

    The speakers of the train folder are split into train and val. The test folder is the test split; a speaker who is
    in both folders is kept there only, and one line on stdout says so.

    Args:
        root: data_aishell3 or a folder that holds it.
        max_speakers: at most that many of each folder, train and test.
        max_hours: at most so much of each folder.
        val_fraction: share of the train folder's speakers.
        seed: of all choices.

    Raises:
        DataError: the folders are not those of AISHELL-3, or too many recordings cannot be read.
    """
    base = find_folder(root, "train/wav").parent.parent
    tested = {path.name for path in (base / "test" / "wav").glob("*") if path.is_dir()}
    in_both = sorted(tested & {path.name for path in (base / "train" / "wav").glob("*")})
    if in_both:
        print(f"{base}: {len(in_both)} speaker(s) in both train and test, kept in test only: {', '.join(in_both)}")
    people = _people(base / "spk-info.txt")

    def rows(part: str, without: set[str]) -> list[Row]:
        found = scan_speakers(base / part / "wav", without=without, max_speakers=max_speakers, seed=seed)
        if max_hours is not None:
            found = take_hours(found, max_hours=max_hours, seed=seed)
        texts = _texts(base / part / "content.txt")
        for row in found:
            text = texts.get(Path(row["audio_filepath"]).stem)
            row |= ({"text": text} if text else {}) | people.get(row["speaker"], {})
        return found

    splits = split_by_speaker(rows("train", tested), seed=seed, val_fraction=val_fraction, test_fraction=0)
    return splits | {"test": rows("test", set()) if tested else []}


def _texts(path: Path) -> dict[str, str]:
    """Recording -> its characters, without the pinyin between them."""
    texts = {}
    for line in _lines(path):
        name, *words = line.split()
        texts[Path(name).stem] = "".join(word for word in words if not _PINYIN.fullmatch(word))
    return texts


def _people(path: Path) -> dict[str, Row]:
    """Speaker -> gender and age group, as far as they are given; the order of the columns does not matter."""
    people = {}
    for line in _lines(path):
        if not line.startswith("#"):
            name, *facts = line.split()
            gender = next((fact for fact in facts if fact in _GENDERS), None)
            age_group = next((fact for fact in facts if fact in _AGE_GROUPS), None)
            person = {"gender": gender, "age_group": age_group}
            people[name] = {key: value for key, value in person.items() if value}
    return people


def _lines(path: Path) -> list[str]:
    """The lines of an optional file that hold something."""
    if not path.is_file():
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8 or remove it (it is optional)") from None
