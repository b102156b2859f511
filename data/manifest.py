"""Manifests: one recording, fixed mixture, echo recording or image per row, NeMo's keys, paths relative to its folder.

    {"audio_filepath": "speech/anna/01.flac", "duration": 4.2, "speaker": "anna", "text": "..."}
    {"mix_filepath": "mix/7.wav", "s1_filepath": "s1/7.wav", "s2_filepath": "s2/7.wav", "duration": 4.2, "id": "7"}
    {"mic_filepath": "7_mic.wav", "farend_filepath": "7_lpb.wav", "duration": 9.0, "scenario": "far_end"}
    {"image_filepath": "photos/7.jpg", "mask_filepath": "masks/7.png", "source": "harbour", "split": "train"}

The first is a talker (or a noise: no speaker), the second a mixture that was made once and for all, its noise as
`noise_filepath` where it has one. The third is a microphone with its far-end reference, and as `clean_filepath` what
should be left of it, where that is known, to be multiplied with `clean_scale` (1 where it is not given) to have the
level that it has in the microphone; `delay_ms` says by how much the echo comes later. The fourth is an image whose
marks a mask shows, or as `clean_filepath` the same photo without its marks; with `marked: false` one that has none,
with none of these a photo to draw marks on. `source` names the photo that several images were made from. A manifest
holds one kind. JSON lines, or CSV with the same names as columns when the file's name ends in .csv (see `data.tables`).

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
from data.echo_scenarios import SCENARIOS
from data.errors import ManifestError
from data.tables import is_csv, read_table

TALKER_KEYS = ("audio_filepath", "duration")
MIXTURE_KEYS = ("mix_filepath", "s1_filepath", "duration")
ECHO_KEYS = ("mic_filepath", "duration")
IMAGE_KEYS = ("image_filepath",)
LINE_KEY = "manifest_line"

# The key that tells a row's kind (the first that it has), what such a row is called, and the keys that it needs.
_KINDS = {
    "audio_filepath": ("a talker", TALKER_KEYS),
    "mix_filepath": ("a fixed mixture", MIXTURE_KEYS),
    "mic_filepath": ("an echo recording", ECHO_KEYS),
    "image_filepath": ("an image", IMAGE_KEYS),
}
_NUMBERS = ("duration", "offset", "delay_ms", "clean_scale")
_NAMES = ("speaker", "id")
_SPLITS = ("train", "val", "test")
_SOURCE_KEY = re.compile(r"s([1-9]\d*)_filepath")


def read_manifest(
    path: PathLike, *, required: Sequence[str] | None = None, keep: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Read and check a manifest.

    Args:
        path: the JSON-lines or CSV file.
        required: keys that each row must have. None: those of talkers (`TALKER_KEYS`), fixed mixtures
            (`MIXTURE_KEYS`), echo recordings (`ECHO_KEYS`, a scenario and the far end that it has) or images
            (`IMAGE_KEYS`), whichever the first row is; all others must be of the same kind.
        keep: the keys to look at, with the names that they get; None: all, as they are.

    Returns:
        One dict per row, in order. Paths are absolute and normalised, `speaker` and `id` are str, optional keys
        whose value is null are left out, unknown keys are kept. An echo recording without `scenario` gets the one
        that its `kind` names. `manifest_line` names the row in messages: "train.jsonl, line 12".

    Raises:
        ManifestError: the file is missing, a folder, empty or not UTF-8, or a row is not what it should be.
    """
    folder, name = Path(os.path.abspath(path)).parent, Path(path).name
    rows: list[dict[str, Any]] = []
    for number, values in read_table(path):
        if keep is not None:
            values = {keep[key]: value for key, value in values.items() if key in keep}
        try:
            row = _read_row(_typed(values) if is_csv(path) else values, folder, required)
            if required is None and rows and main_key(row) != main_key(rows[0]):
                here, there = (f"{_KINDS[key][0]} ({key})" for key in (main_key(row), main_key(rows[0])))
                raise ManifestError(f"{here} in a manifest that begins with {there}; make two manifests of them")
        except ManifestError as error:
            raise ManifestError(f"{path}, line {number}: {error}") from None
        rows.append(row | {LINE_KEY: f"{name}, line {number}"})
    if not rows:
        raise ManifestError(f"{path}: the manifest is empty")
    return rows


def place_of(row: Mapping[str, Any]) -> str:
    """A row of recordings or images in a message: its line and its file, "train.jsonl, line 12: /speech/a.wav"."""
    keys = (LINE_KEY, "audio_filepath", "mic_filepath", "image_filepath")
    return ": ".join(str(row[key]) for key in keys if row.get(key))


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


def main_key(row: Mapping[str, Any]) -> str:
    """The key that tells a row's kind and names its main file: audio_, mix_, mic_ or image_filepath."""
    hints = {"farend_filepath": "mic_filepath", "mask_filepath": "image_filepath", "marked": "image_filepath"}
    missing = next((key for hint, key in hints.items() if hint in row), "audio_filepath")
    return next((key for key in _KINDS if key in row), missing)


def is_mixture(row: Mapping[str, Any]) -> bool:
    """Whether a row is a fixed mixture."""
    return main_key(row) == "mix_filepath"


def is_echo(row: Mapping[str, Any]) -> bool:
    """Whether a row is a microphone with its far-end reference."""
    return main_key(row) == "mic_filepath"


def is_image(row: Mapping[str, Any]) -> bool:
    """Whether a row is an image."""
    return main_key(row) == "image_filepath"


def source_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of a fixed mixture's sources in order: s1_filepath, s2_filepath, …"""
    return sorted((key for key in row if _SOURCE_KEY.fullmatch(key)), key=lambda key: (len(key), key))


def path_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row that name files."""
    return [key for key in row if key.endswith("_filepath")]


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A CSV row with its numbers, true and false read; text that is neither stays, and is refused by the checks."""
    read: dict[str, Any] = dict(row)
    if "marked" in row:
        read["marked"] = {"true": True, "false": False}.get(row["marked"].lower(), row["marked"])
    for key in _NUMBERS:
        try:
            read[key] = float(row[key])
        except (KeyError, ValueError):
            continue
    return read


def _read_row(row: dict[str, Any], folder: Path, required: Sequence[str] | None) -> dict[str, Any]:
    needed = _KINDS[main_key(row)][1] if required is None else required
    missing = next((key for key in needed if key not in row), None)
    if missing is not None:
        hint = " (seconds; python -m data.prepare manifest writes it)" if missing == "duration" else ""
        raise ManifestError(f"key {missing!r} is missing{hint}; each row needs {', '.join(needed)}")
    sources = source_keys(row) if is_mixture(row) else []
    if sources and sources[-1] != f"s{len(sources)}_filepath":
        raise ManifestError(f"{sources[-1]} without all before it: there is {', '.join(sources)}")
    if is_echo(row):
        row = _with_scenario(row, strict=required is None)
    if is_image(row):
        row = _with_known_marks(row)
    return {key: _checked(key, value, folder) for key, value in row.items()}


def _with_scenario(row: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """An echo recording with its scenario: the one it states, or that its `kind` names ("real far-end single talk").

    *strict*: there must be one, and the far end that it has.
    """
    scenario = row.get("scenario")
    if scenario is None:
        kind = re.sub("[^a-z]", "", str(row.get("kind", "")).lower())
        named = [name for name in SCENARIOS if name.replace("_", "") in kind]
        scenario = named[0] if len(named) == 1 else None
    elif scenario not in SCENARIOS:
        raise ManifestError(f"scenario must be one of {', '.join(SCENARIOS)}, got {json.dumps(scenario)[:60]}")
    if strict and scenario is None:
        raise ManifestError(
            f"its scenario is not known: set scenario to one of {', '.join(SCENARIOS)}"
            ' (or kind to words such as "real far-end single talk")'
        )
    if strict and "farend_filepath" not in row and scenario != "near_end":
        raise ManifestError(f"key 'farend_filepath' is missing; only near_end rows may do without, this is {scenario}")
    return row if scenario is None else row | {"scenario": scenario}


def _with_known_marks(row: dict[str, Any]) -> dict[str, Any]:
    """An image row that does not contradict itself about its marks, its `source` as text."""
    marked = row.get("marked")
    if "marked" in row and not isinstance(marked, bool):
        raise ManifestError(f"marked must be true or false, got {json.dumps(marked)[:60]}")
    known_by = [key for key in ("mask_filepath", "clean_filepath") if key in row]
    if len(known_by) > 1:
        raise ManifestError("mask_filepath and clean_filepath both say where the marks are; keep one")
    if marked is False and known_by:
        raise ManifestError(f"marked is false, but {known_by[0]} says where its marks are; keep one")
    if marked is True and not known_by:
        raise ManifestError("marked is true, but nothing says where its marks are: add mask_filepath or clean_filepath")
    if row.get("split", "train") not in _SPLITS:
        raise ManifestError(f"split must be one of {', '.join(_SPLITS)}, got {json.dumps(row['split'])[:60]}")
    source = row.get("source", "")
    if not isinstance(source, str | int) or isinstance(source, bool):
        raise ManifestError(f"source must be text, got {json.dumps(source)[:60]}")
    return row | {"source": str(source)} if "source" in row else row


def _checked(key: str, value: Any, folder: Path) -> Any:
    """The value of one key, in the type that readers rely on."""
    if key in _NUMBERS:
        return _number(key, value)
    if key in _NAMES and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    is_path = key.endswith("_filepath")
    if is_path or key in (*_NAMES, "text"):
        if not isinstance(value, str) or (is_path and not value):
            raise ManifestError(f"{key} must be text, got {json.dumps(value)[:60]}")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ManifestError(f"{key} holds a character that no file name can have")
    return os.path.normpath(folder / str(value)) if is_path else value


def _number(key: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (key in ("duration", "clean_scale") and number == 0):
        what = {"delay_ms": "number of milliseconds", "clean_scale": "factor above 0"}.get(key, "number of seconds")
        raise ManifestError(f"{key} must be a {what}, got {json.dumps(value)[:60]}")
    return number


def _portable(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row as it is stored: paths inside `folder` relative, and no note of where it was read."""
    stored = {key: value for key, value in row.items() if key != LINE_KEY}
    for key in path_keys(stored):
        path = Path(os.path.normpath(stored[key]))
        stored[key] = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    return stored
