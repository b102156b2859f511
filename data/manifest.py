"""Manifests: one JSON object per line, NeMo's keys, paths relative to the manifest's own folder.

    {"audio_filepath": "speech/anna/01.flac", "duration": 4.2, "speaker": "anna", "text": "..."}

`offset` (seconds) makes a row a part of a longer file. Every key that ends in `_filepath` is a path and is
treated like `audio_filepath`. A manifest is data from elsewhere: each row is checked, and nothing in it is
ever run. It may name any file that the user can read.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import AUDIO_SUFFIXES, PathLike, atomic_path, audio_info
from data.errors import AudioError, DataError, ManifestError

log = logging.getLogger(__name__)

_MAX_BAD_FILES = 10
_MAX_BAD_FRACTION = 0.01
_MIN_SPEAKERS = 2  # per split: a mixture needs two talkers


def read_manifest(path: PathLike, *, required: Sequence[str] = ("audio_filepath", "duration")) -> list[dict[str, Any]]:
    """Read and check a manifest.

    Args:
        path: the JSON-lines file.
        required: keys that each row must have.

    Returns:
        One dict per line, in order. Paths are absolute and normalised, `speaker` is a str, optional keys
        whose value is null are left out, unknown keys are kept.

    Raises:
        ManifestError: the file is missing, a folder, empty or not UTF-8, or a row is not what it should be.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest; check the path") from None
    except IsADirectoryError:
        raise ManifestError(f"{path}: is a folder, a manifest (one JSON object per line) is needed") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{str(path)!r}: cannot be opened ({error})") from error
    folder = Path(os.path.abspath(path)).parent
    rows = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_read_row(line, folder, required))
            except ManifestError as error:
                raise ManifestError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ManifestError(f"{path}: the manifest is empty")
    return rows


def write_manifest(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest; it appears whole or not at all.

    An absolute path inside the manifest's folder is stored relative, with forward slashes, so that the folder
    can be moved. A relative path is taken to be relative to the manifest's folder already and kept.
    """
    folder = Path(os.path.abspath(path)).parent
    lines = [json.dumps(_portable(row, folder), ensure_ascii=False) + "\n" for row in rows]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def scan_speakers(folder: PathLike) -> list[dict[str, Any]]:
    """Rows for all recordings below a folder, sorted by path.

    The speaker is the first-level sub-folder; for a file directly in the folder it is the file name up to the
    first "_" or "-". Hidden files and folders are passed over. A file that cannot be read is left out with a
    warning.

    Raises:
        DataError: no such folder, no recordings in it, or more than max(10, 1 %) of them cannot be read.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    rows, bad = [], []
    for path in paths:
        try:
            info = audio_info(path)
        except AudioError as error:
            bad.append(str(error))
            continue
        rows.append(
            {
                "audio_filepath": str(path),
                "duration": round(info.duration_s, 3),
                "speaker": _speaker(path.relative_to(root)),
            }
        )
    if len(bad) > max(_MAX_BAD_FILES, _MAX_BAD_FRACTION * len(paths)) or (bad and not rows):
        raise DataError(f"{folder}: {len(bad)} of {len(paths)} recordings cannot be read, the first: {bad[0]}")
    for message in bad:
        log.warning("left out: %s", message)
    if not rows:
        raise DataError(f"{folder}: no recordings in it (looked for {', '.join(AUDIO_SUFFIXES)})")
    return rows


def split_by_speaker(
    rows: Iterable[Mapping[str, Any]], *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> dict[str, list[dict[str, Any]]]:
    """Split rows into train, val and test such that no speaker is in two of them.

    The draw depends on the names of the speakers and `seed` only, not on the order of the rows. Fractions
    count speakers. A split that is wanted (fraction above 0) gets at least two speakers, so that they can
    be mixed.

    Raises:
        DataError: a row without speaker, or too few speakers (six for three splits).
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave a part to train on")
    rows = [dict(row) for row in rows]
    nameless = next((row for row in rows if not row.get("speaker")), None)
    if nameless is not None:
        raise DataError(f"{nameless.get('audio_filepath')}: no speaker given, a split by speaker needs one per row")
    speakers = sorted({row["speaker"] for row in rows})
    wanted = {"val": val_fraction, "test": test_fraction}
    sizes = {name: max(_MIN_SPEAKERS, round(part * len(speakers))) if part > 0 else 0 for name, part in wanted.items()}
    needed = _MIN_SPEAKERS * (1 + sum(size > 0 for size in sizes.values()))
    if len(speakers) < needed:
        raise DataError(
            f"{len(speakers)} speaker(s) found, at least {needed} are needed to split them:"
            " put each speaker's recordings into a folder of its own"
        )
    if len(speakers) - sum(sizes.values()) < _MIN_SPEAKERS:
        raise DataError(
            f"val and test would take {sum(sizes.values())} of {len(speakers)} speakers: lower the fractions"
        )
    drawn = np.random.default_rng(seed).permutation(len(speakers))
    split_of = {}
    for position, index in enumerate(drawn):
        in_val, in_test = position < sizes["val"], position < sizes["val"] + sizes["test"]
        split_of[speakers[index]] = "val" if in_val else "test" if in_test else "train"
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for row in rows:
        splits[split_of[row["speaker"]]].append(row)
    return splits


def _read_row(line: bytes, folder: Path, required: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ManifestError("not UTF-8 text; is this a manifest (one JSON object per line)?") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not valid JSON ({error}); a manifest has one JSON object per line") from None
    if not isinstance(row, dict):
        raise ManifestError(f"a JSON object is needed, got {type(row).__name__}")
    missing = [key for key in required if row.get(key) is None]
    if missing:
        raise ManifestError(f"key {missing[0]!r} is missing; each row needs {', '.join(required)}")
    return {key: _checked(key, value, folder) for key, value in row.items() if value is not None}


def _checked(key: str, value: Any, folder: Path) -> Any:
    """The value of one key, in the type that readers rely on."""
    if key in ("duration", "offset"):
        return _seconds(key, value)
    if key == "speaker" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    is_path = key.endswith("_filepath")
    if is_path or key in ("speaker", "text"):
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
    """The row with its paths inside `folder` made relative."""
    stored = dict(row)
    for key, value in row.items():
        if key.endswith("_filepath"):
            path = Path(os.path.normpath(value))
            stored[key] = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    return stored


def _speaker(relative: Path) -> str:
    if len(relative.parts) > 1:
        return relative.parts[0]
    return relative.stem.replace("-", "_").split("_", 1)[0] or relative.stem
