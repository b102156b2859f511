"""Recordings of single talkers: scanning folders of them, choosing some, splitting them by speaker."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import AUDIO_SUFFIXES, PathLike, audio_info
from data.errors import DataError
from data.folders import leave_out_bad, recordings_below

_MIN_SPEAKERS = 2  # per split: a mixture needs two talkers


def scan_speakers(
    folder: PathLike, *, without: Collection[str] = (), max_speakers: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for the recordings below a folder, sorted by path.

    The speaker is the first-level sub-folder; for a file directly in the folder it is the file name up to the
    first "_" or "-". Hidden files and folders are passed over. A file that cannot be read is left out with a
    warning.

    Args:
        folder: where to look.
        without: speakers to pass over.
        max_speakers: choose that many of the speakers; the choice depends on their names and `seed` only.
        seed: of that choice.

    Raises:
        DataError: no such folder, no recordings in it, or more than max(10, 1 %) of them cannot be read.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    speaker_of = {path: _speaker(path.relative_to(root)) for path in recordings_below(root)}
    if not speaker_of:
        raise DataError(f"{folder}: no recordings in it (looked for {', '.join(AUDIO_SUFFIXES)})")
    speakers = sorted(set(speaker_of.values()) - set(without))
    drawn = np.random.default_rng(seed).permutation(len(speakers))[:max_speakers]
    chosen = {speakers[index] for index in drawn}

    def row(path: Path) -> dict[str, Any]:
        duration_s = round(audio_info(path).duration_s, 3)
        return {"audio_filepath": str(path), "duration": duration_s, "speaker": speaker_of[path]}

    return leave_out_bad([path for path in speaker_of if speaker_of[path] in chosen], row, where=folder)


def take_hours(rows: Sequence[dict[str, Any]], *, max_hours: float, seed: int = 0) -> list[dict[str, Any]]:
    """As many rows as last `max_hours`, in their order. Speakers take turns, each with a random one of theirs."""
    turns: dict[str, int] = {}
    queue = []  # (the speaker's how manieth, position in the draw, index of the row)
    for position, index in enumerate(np.random.default_rng(seed).permutation(len(rows))):
        speaker = rows[index]["speaker"]
        turns[speaker] = turns.get(speaker, 0) + 1
        queue.append((turns[speaker], position, index))
    total_s, taken = 0.0, []
    for _, _, index in sorted(queue):
        total_s += rows[index]["duration"]
        if total_s > max_hours * 3600:
            break
        taken.append(index)
    return [rows[index] for index in sorted(taken)]


def split_by_speaker(
    rows: Iterable[Mapping[str, Any]], *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> dict[str, list[dict[str, Any]]]:
    """Split rows into train, val and test such that no speaker is in two of them.

    The draw depends on the names of the speakers and `seed` only, not on the order of the rows. Fractions
    count speakers. A split that is wanted (fraction above 0) gets at least two speakers, so that they can
    be mixed.

    Raises:
        DataError: fractions that leave nothing, a row without speaker, or too few speakers (six for three splits).
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise DataError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave a part to train on")
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


def _speaker(relative: Path) -> str:
    if len(relative.parts) > 1:
        return relative.parts[0]
    return relative.stem.replace("-", "_").split("_", 1)[0] or relative.stem
