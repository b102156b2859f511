"""Text tables from elsewhere: JSON lines, or CSV when the file's name ends in .csv. One line is one row.

Every error names the file and the line. A table is data: it is parsed, nothing in it is ever run. A CSV file has a
header of column names, commas between fields and double quotes where a field holds a comma; an empty field is a
value that is not given. UTF-8, with or without byte order mark.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.audio import LFS_HEAD, PathLike
from data.errors import ManifestError


def is_csv(path: PathLike) -> bool:
    """Whether a table is CSV, by its name."""
    return Path(path).suffix.lower() == ".csv"


def read_table(path: PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and rows of a table. Values of a CSV file are text; those that are not given are left out.

    Raises:
        ManifestError: the file cannot be read, or a line is not a row in UTF-8.
    """
    header: list[str] | None = None
    content = _read(path)
    if content.startswith(LFS_HEAD):
        raise ManifestError(f"{path}: is a Git-LFS pointer, not a table; run `git lfs pull` where it came from")
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = _decoded(line)
            if not is_csv(path):
                yield number, _json_row(text)
            elif header is None:
                header = _csv_header(text)
            else:
                yield number, _csv_row(text, header)
        except ManifestError as error:
            raise ManifestError(f"{path}, line {number}: {error}") from None


def _read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        folder = Path(path).parent.name
        maker = {"demo_data": "demo", "demo_photos": "demo_photos"}.get(folder)  # named by recipes before it is made
        hint = f"make it with: python -m data.prepare {maker} --output {folder}" if maker else "check the path"
        raise ManifestError(f"{path}: no such manifest; {hint}") from None
    except IsADirectoryError:
        raise ManifestError(f"{path}: is a folder, a manifest (JSON lines or CSV) is needed") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ManifestError(f"{str(path)!r}: cannot be opened ({error})") from error


def _decoded(line: bytes) -> str:
    if b"\0" in line:
        raise ManifestError("holds a NUL byte: damaged, or not UTF-8 text; write it again as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ManifestError("not UTF-8 text; save it as UTF-8, or is this no manifest (JSON lines or CSV)?") from None


def _json_row(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not valid JSON ({error}); a manifest has one JSON object per line") from None
    if not isinstance(row, dict):
        raise ManifestError(f"a JSON object is needed, got {type(row).__name__}")
    return {key: value for key, value in row.items() if value is not None}


def _csv_header(text: str) -> list[str]:
    names = [name.strip() for name in _csv_fields(text)]
    if len(names) == 1 and (";" in text or "\t" in text):
        raise ManifestError("columns are separated by commas in a CSV file, not by semicolons or tabs")
    if "" in names:
        raise ManifestError(f"column {names.index('') + 1} has no name; a CSV file begins with a line of column names")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"column {twice!r} is there twice; rename one")
    return names


def _csv_row(text: str, header: list[str]) -> dict[str, str]:
    fields = _csv_fields(text)
    if len(fields) != len(header):
        raise ManifestError(
            f"{len(fields)} fields, the header has {len(header)}; put a field that holds a comma into double quotes"
        )
    return {name: field for name, field in zip(header, fields, strict=True) if field}


def _csv_fields(text: str) -> list[str]:
    try:
        return next(csv.reader([text.rstrip("\r")], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ManifestError(f"not valid CSV ({error}); a row is one line, with double quotes in pairs") from None
