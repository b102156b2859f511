"""Folders of recordings: finding a corpus in one, listing the recordings, leaving out what cannot be read."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.audio import AUDIO_SUFFIXES, PathLike
from data.errors import DataError

log = logging.getLogger(__name__)

_MAX_BAD_FILES = 10
_MAX_BAD_FRACTION = 0.01
_MAX_LISTED = 8

Item = TypeVar("Item")


def find_folder(root: PathLike, inner: str) -> Path:
    """The one folder `inner` in `root`, or in a folder one or two levels below it; absolute.

    Raises:
        DataError: no such root, nothing found (says what there is), or several.
    """
    top = Path(os.path.abspath(root))
    if not top.is_dir():
        raise DataError(f"{root}: no such folder")
    places = [top, *sorted(top.glob("*")), *sorted(top.glob("*/*"))]
    found = sorted(place / inner for place in places if (place / inner).is_dir())
    if not found:
        raise DataError(f"{root}: looked for {inner} in it and up to two levels below, there is {contents(top)}")
    if len(found) > 1:
        raise DataError(f"{root}: holds more than one {inner}, name one: {', '.join(map(str, found))}")
    return found[0]


def contents(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more if names else "nothing"


def recordings_below(folder: Path) -> list[Path]:
    """All recordings below a folder, sorted; hidden files and folders are passed over."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def leave_out_bad(
    items: Sequence[Item], make_row: Callable[[Item], dict[str, Any]], *, where: PathLike, what: str = "recordings"
) -> list[dict[str, Any]]:
    """The rows that `make_row` makes of the items; one for which it raises a DataError is left out with a warning.

    Raises:
        DataError: nothing is left, or more than max(10, 1 %) are bad; it names the first.
    """
    rows, bad = [], []
    for item in items:
        try:
            rows.append(make_row(item))
        except DataError as error:
            bad.append(str(error))
    if len(bad) > max(_MAX_BAD_FILES, _MAX_BAD_FRACTION * len(items)) or (bad and not rows):
        raise DataError(f"{where}: {len(bad)} of {len(items)} {what} cannot be used, the first: {bad[0]}")
    for message in bad:
        log.warning("left out: %s", message)
    if bad:
        log.warning("%s: %d of %d %s left out", where, len(bad), len(items), what)
    return rows
