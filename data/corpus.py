"""A corpus that `data.prepare` made: its description `corpus.json`, and checks of its files and manifests.

The description is written twice: first with `complete: false` and the planned files, last with their sizes.
So an interrupted making is recognised, and only files of a corpus of ours are ever replaced or removed.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.audio import atomic_path, audio_info, read_audio
from data.errors import DataError
from data.fixed_echo import common_samples
from data.manifest import is_echo, is_mixture, path_keys, read_manifest

DESCRIPTION = "corpus.json"
SPLITS = ("train", "val", "test")

_DURATION_TOLERANCE_S = 0.02
_TAIL_S = 0.05
_MAX_SUMS = 200  # mixtures of a split that are added up
_STEP = 1 / 32768  # of 16 bits


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What `corpus.json` says. `made_by` is the maker's format and parameters; `files` maps path -> bytes or None."""

    made_by: dict[str, Any]
    complete: bool
    files: dict[str, int | None]


def read_corpus(folder: Path) -> Corpus | None:
    """The description in `folder`, None if there is none. Raises DataError for one that is not ours."""
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        corpus = Corpus(made_by=content["made_by"], complete=content["complete"] is True, files=dict(content["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "remove it or choose another --output"
        raise DataError(f"{path}: not the description of a corpus ({type(error).__name__}); {hint}") from error
    return corpus


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """Write the description; it appears whole or not at all."""
    content = {"made_by": corpus.made_by, "complete": corpus.complete, "files": corpus.files}
    with atomic_path(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def damaged_files(folder: Path, corpus: Corpus) -> list[str]:
    """One line per file that is missing or has another size than when it was made."""
    problems = []
    for name, num_bytes in corpus.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.stat().st_size != num_bytes:
            problems.append(f"{path}: has {path.stat().st_size} bytes instead of {num_bytes}")
    return problems


def is_finished(folder: Path, *, made_by: dict[str, Any]) -> bool:
    """True if `folder` holds this very corpus, whole."""
    corpus = read_corpus(folder)
    return bool(corpus and corpus.complete and corpus.made_by == _plain(made_by) and not damaged_files(folder, corpus))


def begin_corpus(folder: Path, *, made_by: dict[str, Any], planned: Iterable[str]) -> None:
    """Prepare `folder` for a making, and say on stdout why there is one.

    Files of an earlier corpus that will not be written again are removed, and nothing else is. Raises DataError if a
    planned file exists that belongs to no corpus.
    """
    planned, made_by = set(planned), _plain(made_by)
    before = read_corpus(folder)
    if before is None:
        foreign = next((name for name in sorted(planned) if (folder / name).exists()), None)
        if foreign:
            raise DataError(f"{folder / foreign}: exists and is not part of a corpus; choose another --output")
        reason = "making the corpus"
    elif before.made_by != made_by:
        reason = f"replacing the corpus there, made with {_differences(before.made_by, made_by)}"
    elif not before.complete:
        reason = "an earlier making was interrupted, making the corpus again"
    else:
        reason = f"{len(damaged_files(folder, before))} file(s) missing or damaged, making the corpus again"
    print(f"{folder}: {reason}", flush=True)
    if before is not None:
        _remove(folder, before.files.keys() - planned)
    write_corpus(folder, Corpus(made_by=made_by, complete=False, files=dict.fromkeys(sorted(planned))))


def _plain(made_by: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: lists for tuples."""
    return json.loads(json.dumps(made_by))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} (now {new.get(key)})" for key in changed)


def finish_corpus(folder: Path, *, made_by: dict[str, Any], planned: Iterable[str]) -> None:
    """Write the final description: the planned files that were made, with their sizes."""
    made = {name: (folder / name).stat().st_size for name in planned if (folder / name).exists()}
    write_corpus(folder, Corpus(made_by=made_by, complete=True, files=made))


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files below `folder`, and the folders that this empties."""
    root = folder.resolve()
    for name in names:
        path = (root / name).resolve()
        if path.is_relative_to(root) and path.is_file():  # a description can name anything
            path.unlink()
            if path.parent != root and not any(path.parent.iterdir()):
                path.parent.rmdir()


def check_splits(
    folder: Path, *, prefix: str = "", suffix: str = "", owner: str = "speaker", shared: Collection[str] = ()
) -> list[str]:
    """One line per problem of the manifests `<prefix>{train,val,test}<suffix>.jsonl` that are in `folder`.

    Every recording must be readable up to the end that its row states, and neither a recording nor an owner
    (the value of that key: the speaker, the room) may be in two splits. The files of a fixed mixture must be equally
    long and add up to it; of more than 200 in a split, 200 are tried, and one line on stdout says so. Those of an
    echo recording must have one sample rate and be equally long. There must be at least one manifest.

    Args:
        folder: where the manifests are.
        prefix, suffix: of their names.
        owner: key whose values belong to one split.
        shared: two splits that may have owners in common.
    """
    paths = {split: folder / f"{prefix}{split}{suffix}.jsonl" for split in SPLITS}
    if not any(path.exists() for path in paths.values()):
        return [f"{paths['train']}: no such manifest; check the path"]
    return check_manifests(paths, owner=owner, shared=shared)


def check_manifests(paths: Mapping[str, Path], *, owner: str = "speaker", shared: Collection[str] = ()) -> list[str]:
    """One line per problem of manifests that are to have nothing in common, as `check_splits`.

    Args:
        paths: split -> manifest; one that does not exist is passed over.
        owner, shared: as for `check_splits`.
    """
    problems: list[str] = []
    seen: dict[tuple[str, str], str] = {}  # ("file" or "owner", its name) -> split
    for split, path in paths.items():
        if not path.exists():
            continue
        try:
            rows = read_manifest(path)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += [problem for row in rows for problem in _check_files(row)]
        problems += _check_sums([row for row in rows if is_mixture(row)], path)
        owned = {("file", row[key]) for row in rows for key in path_keys(row)}
        owned |= {("owner", row[owner]) for row in rows if owner in row}
        for sort, name in sorted(owned & seen.keys()):
            other = seen[sort, name]
            if sort == "file" or {split, other} != set(shared):
                problems.append(f"{path}: {name} is also in {paths[other].name}")
        seen |= dict.fromkeys(owned, split)
    return problems


def _check_files(row: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a row, each for itself or beside the others."""
    problems = [problem for key in path_keys(row) for problem in _check_file(row, row[key])]
    if is_echo(row) and not problems:
        try:
            common_samples(row)
        except DataError as error:
            problems.append(str(error))
    return problems


def _check_file(row: dict[str, Any], path: str) -> list[str]:
    """Compare a row with a file of it; reading the tail finds a cut-off file at the price of one seek."""
    end_s = row.get("offset", 0.0) + row["duration"]
    try:
        info = audio_info(path)
        if info.duration_s < end_s - _DURATION_TOLERANCE_S or (
            "offset" not in row and info.duration_s > end_s + _DURATION_TOLERANCE_S
        ):
            return [f"{path}: lasts {info.duration_s:.2f} s, its manifest says {end_s:.2f} s"]
        read_audio(path, sample_rate=info.sample_rate, offset_s=max(0.0, info.duration_s - _TAIL_S))
    except DataError as error:
        return [str(error)]
    return []


def _check_sums(rows: list[dict[str, Any]], path: Path) -> list[str]:
    """What does not add up among the mixtures of a manifest, evenly spaced ones if they are many."""
    tried = rows
    if len(rows) > _MAX_SUMS:
        tried = [rows[index * len(rows) // _MAX_SUMS] for index in range(_MAX_SUMS)]
        print(f"{path}: {_MAX_SUMS} of {len(rows)} mixtures are added up")
    return [problem for row in tried for problem in _check_sum(row)]


def _check_sum(row: dict[str, Any]) -> list[str]:
    """Add up the sources (and the noise) of a fixed mixture; each file may be off by one step of 16 bits."""
    mix, parts = row["mix_filepath"], [row[key] for key in path_keys(row) if key != "mix_filepath"]
    try:
        rate = audio_info(mix).sample_rate
        mixture, *signals = (read_audio(path, sample_rate=rate) for path in (mix, *parts))
    except DataError:
        return []  # a file that cannot be read has had its line already
    odd = next((part for part, signal in zip(parts, signals, strict=True) if len(signal) != len(mixture)), None)
    if odd is not None:
        return [f"{odd}: its length differs from that of its mixture {mix}"]
    off = float((mixture - torch.stack(signals).sum(0)).abs().max())
    if off > (1 + len(parts)) * _STEP:
        return [f"{mix}: differs by up to {off:.2g} from the sum of {', '.join(Path(part).name for part in parts)}"]
    return []
