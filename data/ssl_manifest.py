"""Manifests of self-supervised training, as NeMo has them: recordings, or parts of them, and nothing else.

    {"audio_filepath": "speech/anna/01.flac", "duration": 4.2, "offset": 12.0}

`audio_filename` is read as `audio_filepath`. A row without `duration` is taken whole. A transcript and unknown keys are
not looked at. Otherwise these are the manifests of `data.manifest`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data.audio import audio_info
from data.errors import AudioError, DataError
from data.manifest import read_manifest

log = logging.getLogger(__name__)

_KEPT = {"audio_filename": "audio_filepath"} | {
    key: key for key in ("audio_filepath", "duration", "offset", "speaker", "id")
}


def manifest_paths(key: str, value: Any) -> list[str]:
    """The files that a setting names: a path, several in one text with commas between them, or a list of either.

    Args:
        key: the setting, for messages.

    Raises:
        DataError: it is none of these.
    """
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{key} must be the path of a manifest, or a list of paths, got {value!r}")
    paths = [path.strip() for text in texts for path in text.split(",") if path.strip()]
    if not paths:
        raise DataError(f"{key} names no manifest, got {value!r}")
    return paths


def read_recordings(path: str) -> list[dict[str, Any]]:
    """The rows of one manifest: `audio_filepath`, and `duration`, `offset` (seconds), `speaker`, `id` where given.

    Raises:
        ManifestError: as `read_manifest`.
    """
    return read_manifest(path, required=("audio_filepath",), keep=_KEPT)


def within(
    rows: Sequence[dict[str, Any]], *, min_duration_s: float | None, max_duration_s: float | None, where: str
) -> list[dict[str, Any]]:
    """The rows that last from `min_duration_s` to `max_duration_s`, and those that do not say how long they last.

    One line in the log says how many were left out and what stays.

    Raises:
        DataError: no row is left.
    """
    least = 0.0 if min_duration_s is None else min_duration_s
    most = float("inf") if max_duration_s is None else max_duration_s
    kept = [row for row in rows if "duration" not in row or least <= row["duration"] <= most]
    if not kept:
        raise DataError(
            f"{where}: none of its {len(rows)} recordings lasts from {least:g} to {most:g} s; change min_duration or"
            " max_duration, or the manifest"
        )
    hours = sum(row.get("duration", 0.0) for row in kept) / 3600
    unknown = sum("duration" not in row for row in kept)
    log.info(
        "%s: %d of %d recordings are left out (shorter than %g s or longer than %g s), %.2f hours stay%s",
        where,
        len(rows) - len(kept),
        len(rows),
        least,
        most,
        hours,
        f" and {unknown} recordings without duration" if unknown else "",
    )
    return kept


def duration_s(row: Mapping[str, Any]) -> float:
    """Seconds that a row lasts: as it says, or else its file's header; 0 where that cannot be read."""
    if "duration" in row:
        return row["duration"]
    try:
        return max(0.0, audio_info(row["audio_filepath"]).duration_s - row.get("offset", 0.0))
    except AudioError:
        return 0.0
