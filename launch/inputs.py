"""What a user means by `input=`: a file, a folder, a glob or a manifest -> what to read and how to name its results."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.audio import AUDIO_SUFFIXES
from data.images import IMAGE_SUFFIXES
from data.manifest import main_key, read_manifest
from launch.errors import ConfigError

_SUFFIXES: dict[str, tuple[str, ...]] = {"audio": AUDIO_SUFFIXES, "image": IMAGE_SUFFIXES, "array": (".npy",)}
_IMAGE_KEY = "image_filepath"
_MANIFESTS = (".jsonl", ".json", ".csv")


class Input(NamedTuple):
    """A recording, or the part of one that a manifest row names, in seconds.

    *name*: of its results, without a suffix, as a path below the output folder.
    """

    path: Path
    name: str
    offset_s: float = 0.0
    duration_s: float | None = None


def list_inputs(where: str, kind: str, output: Path, *, row_key: str | None = None) -> list[Input]:
    """What *where* stands for, in order and each once.

    A folder is searched with all below it, but for hidden files and for *output* should it lie inside. Names keep the
    structure below the folder; below the part of a glob without wildcards; below the deepest common folder of a
    manifest's files. A manifest holds recordings (`audio_filepath`, with `offset` a part of one), mixtures
    (`mix_filepath`), echo recordings (`mic_filepath`, or what *row_key* says) or images (`image_filepath`).

    Raises ConfigError when nothing is found, ManifestError for a manifest that cannot be used.
    """
    path = Path(where)
    if path.is_dir():
        found = _inside([file for file in sorted(path.rglob("*")) if _is_recording(file, path, kind, output)], path)
    elif is_manifest(path):
        found = _of_manifest(path, kind, row_key)
    elif path.exists():
        found = _inside([path], path.parent)
    else:
        files = [Path(name) for name in sorted(glob.glob(where, recursive=True))]
        found = _inside([file for file in files if file.is_file()], _fixed_part(where))
    if not found:
        raise ConfigError(f"{where}: no {kind} file there ({', '.join(_SUFFIXES[kind])})")
    return list(dict.fromkeys(found))


def is_manifest(path: Path) -> bool:
    """Whether a name is that of a manifest, not of a recording."""
    return path.suffix in _MANIFESTS


def of_row(row: Mapping[str, Any], key: str, root: Path) -> Input:
    """The file that a manifest row names under *key*, or its part; called by its place below *root*."""
    (whole,) = _inside([Path(row[key])], root)
    return _part(whole, row) if "offset" in row else whole


def common_folder(rows: Iterable[Mapping[str, Any]], key: str) -> Path:
    """The deepest folder that all the files lie in that rows name under *key*."""
    return Path(os.path.commonpath([Path(row[key]).parent for row in rows]))


def output_names(inputs: list[Input]) -> list[str]:
    """Names that tell all inputs apart: files that differ in their suffix alone keep it, as x_wav and x_flac."""
    shared = Counter(i.name for i in inputs)
    names = [i.name if shared[i.name] == 1 else f"{i.name}_{i.path.suffix.lstrip('.')}" for i in inputs]
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"input: several files would be written as {double[0]}; give them one after the other")
    return names


def _is_recording(file: Path, folder: Path, kind: str, output: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    top, results = folder.resolve(), output.resolve()
    inner = results != top and results.is_relative_to(top) and file.resolve().is_relative_to(results)
    return file.suffix.lower() in _SUFFIXES[kind] and not hidden and not inner and file.is_file()


def _inside(files: list[Path], root: Path) -> list[Input]:
    return [Input(file, file.relative_to(root).with_suffix("").as_posix()) for file in files]


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def _of_manifest(path: Path, kind: str, row_key: str | None) -> list[Input]:
    key = main_key(read_manifest(path, required=())[0])
    if key == "mic_filepath":
        key = row_key or key
    if (key == _IMAGE_KEY) != (kind == "image"):
        key = _IMAGE_KEY if kind == "image" else "audio_filepath"
    rows = read_manifest(path, required=(key,))  # which names the line that has none
    root = common_folder(rows, key)
    return [of_row(row, key, root) for row in rows]


def _part(whole: Input, row: Mapping[str, Any]) -> Input:
    return Input(whole.path, f"{whole.name}_{row['offset']:g}s", row["offset"], row.get("duration"))
