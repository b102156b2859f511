"""Manifests: one recording or one fixed mixture per row, NeMo's keys, paths relative to the manifest's own folder.

    {"audio_filepath": "speech/anna/01.flac", "duration": 4.2, "speaker": "anna", "text": "..."}
    {"mix_filepath": "mix/7.wav", "s1_filepath": "s1/7.wav", "s2_filepath": "s2/7.wav", "duration": 4.2, "id": "7"}

The first is a talker (or a noise: no speaker), the second a mixture that was made once and for all, its noise as
`noise_filepath` where it has one. A manifest holds one kind. JSON lines, or CSV with the same names as columns when
the file's name ends in .csv (see `data.tables`).

`offset` (seconds) makes a row a part of longer files. Every key that ends in `_filepath` is a path and is treated
like `audio_filepath`. A manifest is data from elsewhere: each row is checked, and nothing in it is ever run. It may
name any file that the user can read.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.audio import PathLike, atomic_path
from data.errors import ManifestError
from data.tables import is_csv, read_table

TALKER_KEYS = ("audio_filepath", "duration")
MIXTURE_KEYS = ("mix_filepath", "s1_filepath", "duration")
LINE_KEY = "manifest_line"

_NUMBERS = ("duration", "offset")
_NAMES = ("speaker", "id")
_SOURCE_KEY = re.compile(r"s([1-9]\d*)_filepath")


def read_manifest(path: PathLike, *, required: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read and check a manifest.

    Args:
        path: the JSON-lines or CSV file.
        required: keys that each row must have. None: those of talkers (`TALKER_KEYS`) or of fixed mixtures
            (`MIXTURE_KEYS`), whichever the first row is; all others must be of the same kind.

    Returns:
        One dict per row, in order. Paths are absolute and normalised, `speaker` and `id` are str, optional keys
        whose value is null are left out, unknown keys are kept. `manifest_line` names the row in messages:
        "train.jsonl, line 12".

    Raises:
        ManifestError: the file is missing, a folder, empty or not UTF-8, or a row is not what it should be.
    """
    folder, name = Path(os.path.abspath(path)).parent, Path(path).name
    rows: list[dict[str, Any]] = []
    for number, values in read_table(path):
        try:
            row = _read_row(_numbers(values) if is_csv(path) else values, folder, required)
            if required is None and rows and is_mixture(row) != is_mixture(rows[0]):
                kinds = ["a talker (audio_filepath)", "a fixed mixture (mix_filepath)"]
                here, there = kinds[is_mixture(row)], kinds[is_mixture(rows[0])]
                raise ManifestError(f"{here} in a manifest that begins with {there}; make two manifests of them")
        except ManifestError as error:
            raise ManifestError(f"{path}, line {number}: {error}") from None
        rows.append(row | {LINE_KEY: f"{name}, line {number}"})
    if not rows:
        raise ManifestError(f"{path}: the manifest is empty")
    return rows


def write_manifest(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest as JSON lines; it appears whole or not at all.

    An absolute path inside the manifest's folder is stored relative, with forward slashes, so that the folder
    can be moved. A relative path is taken to be relative to the manifest's folder already and kept.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(manifest_text(path, rows), encoding="utf-8")


def manifest_text(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> str:
    """What `write_manifest` writes to `path`."""
    folder = Path(os.path.abspath(path)).parent
    return "".join(json.dumps(_portable(row, folder), ensure_ascii=False) + "\n" for row in rows)


def is_mixture(row: Mapping[str, Any]) -> bool:
    """Whether a row is a fixed mixture, not a single recording."""
    return "mix_filepath" in row and "audio_filepath" not in row


def source_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of a fixed mixture's sources in order: s1_filepath, s2_filepath, …"""
    return sorted((key for key in row if _SOURCE_KEY.fullmatch(key)), key=lambda key: (len(key), key))


def path_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row that name files."""
    return [key for key in row if key.endswith("_filepath")]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A CSV row with its numbers read; text that is none stays, and is refused by the check that follows."""
    read: dict[str, Any] = dict(row)
    for key in _NUMBERS:
        try:
            read[key] = float(row[key])
        except (KeyError, ValueError):
            continue
    return read


def _read_row(row: dict[str, Any], folder: Path, required: Sequence[str] | None) -> dict[str, Any]:
    if required is None:
        required = MIXTURE_KEYS if is_mixture(row) else TALKER_KEYS
    missing = next((key for key in required if key not in row), None)
    if missing is not None:
        hint = " (seconds; python -m data.prepare manifest writes it)" if missing == "duration" else ""
        raise ManifestError(f"key {missing!r} is missing{hint}; each row needs {', '.join(required)}")
    sources = source_keys(row) if is_mixture(row) else []
    if sources and sources[-1] != f"s{len(sources)}_filepath":
        raise ManifestError(f"{sources[-1]} without all before it: there is {', '.join(sources)}")
    return {key: _checked(key, value, folder) for key, value in row.items()}


def _checked(key: str, value: Any, folder: Path) -> Any:
    """The value of one key, in the type that readers rely on."""
    if key in _NUMBERS:
        return _seconds(key, value)
    if key in _NAMES and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    is_path = key.endswith("_filepath")
    if is_path or key in (*_NAMES, "text"):
        if not isinstance(value, str) or (is_path and not value):
            raise ManifestError(f"{key} must be text, got {json.dumps(value)[:60]}")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ManifestError(f"{key} holds a character that no file name can have")
    return os.path.normpath(folder / str(value)) if is_path else value


def _seconds(key: str, value: Any) -> float:
    try:
        seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0 or (key == "duration" and seconds == 0):
        raise ManifestError(f"{key} must be a number of seconds, got {json.dumps(value)[:60]}")
    return seconds


def _portable(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row as it is stored: paths inside `folder` relative, and no note of where it was read."""
    stored = {key: value for key, value in row.items() if key != LINE_KEY}
    for key in path_keys(stored):
        path = Path(os.path.normpath(stored[key]))
        stored[key] = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    return stored
