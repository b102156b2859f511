"""Signals that belong together: what `input=` and the further signals stand for -> the files of each prediction.

Files are paired by name, endings that say which signal a file holds taken off: x_mic.wav belongs to x_lpb.wav. Where
several folders hold a file of the same name, the place below the folder counts too: a/x.wav belongs to a/x.wav. Both
signals may lie in one folder, and so may the results of an earlier run. A manifest of echo recordings names both.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from data.errors import ManifestError
from data.manifest import LINE_KEY, is_echo, read_manifest
from launch.errors import ConfigError
from launch.inputs import Input, common_folder, is_manifest, list_inputs, of_row, output_names

log = logging.getLogger(__name__)

Signals = dict[str, Input | None]
"""By name; None is silence."""

_SILENCE = "none"
# As the AEC-Challenge has them.
_ENDINGS = {"mic": ("_mic",), "far": ("_lpb", "_farend")}
_ROW_KEYS = {"mic": "mic_filepath", "far": "farend_filepath"}
_MAX_SHOWN = 10


def pair_inputs(kinds: dict[str, str], config: dict[str, Any], *, outputs: Iterable[str]) -> dict[str, Signals]:
    """Output name -> the signals of one prediction.

    *kinds*: the signals that a system takes, name -> `audio`, `image` or `array`. The first is typed as `input`, the
    others by name; `none` is silence for an audio signal. *outputs*: names of the system's results; those that an
    earlier run has written into a folder of inputs are left out.

    Raises ConfigError naming what is missing: no files, a signal that is not given, or a file without its partner;
    ManifestError for a manifest that cannot be used.
    """
    first, *others = kinds
    given = {first: str(config["input"]), **{name: config.get(name) for name in others}}
    output = Path(config["output"])
    missing = [name for name in others if given[name] is None]
    if missing and kinds.keys() == _ROW_KEYS.keys() and (rows := _echo_rows(Path(given[first]))):
        return _of_rows(rows, Path(given[first]))
    if missing:
        hint = "".join(f" ({name}={_SILENCE}: silence)" for name in missing if kinds[name] == "audio")
        raise ConfigError(f"set {', '.join(f'{name}=…' for name in missing)}: the system needs it{hint}")
    heard = [name for name in kinds if name == first or kinds[name] != "audio" or given[name] != _SILENCE]
    found = {name: list_inputs(str(given[name]), kinds[name], output, row_key=_ROW_KEYS.get(name)) for name in heard}
    results: dict[Path, None] = {}
    for name in (name for name in heard if Path(str(given[name])).is_dir()):
        results |= dict.fromkeys(_results_among(found[name], kinds, outputs))
        found[name] = [file for file in found[name] if file.path not in results]
    if results:
        log.info("%d files are left out as results of an earlier run, such as %s", len(results), next(iter(results)))
    if not others:  # its only signal keeps its whole name
        return {name: {first: file} for name, file in zip(output_names(found[first]), found[first], strict=True)}
    if len(heard) == 1:
        pairs = [{first: file} for file in _own_files(found, list(kinds))[first]]
    elif all(len(found[name]) == 1 and Path(str(given[name])).is_file() for name in heard):
        pairs = [{name: found[name][0] for name in heard}]  # two files that were typed, whatever they are called
    else:
        pairs = _by_name(found, {name: str(given[name]) for name in heard}, list(kinds))
    called = output_names([pair[first]._replace(name=_output_name(pair[first], first)) for pair in pairs])
    return {name: dict.fromkeys(kinds) | pair for name, pair in zip(called, pairs, strict=True)}


def _results_among(files: list[Input], signals: Iterable[str], outputs: Iterable[str]) -> list[Path]:
    """x_enhanced.wav or x_source1.wav, where there is an x.wav, or an x_mic.wav or x_lpb.wav."""
    kinds = "|".join(f"{re.escape(name)}|{re.escape(name.removesuffix('s'))}\\d+" for name in outputs)
    result = re.compile(rf"(.+)_(?:{kinds})")
    sources = {_without_ending(file.path.stem, signal) for file in files for signal in signals}
    sources |= {name for file in files for name in (file.path.stem, f"{file.path.stem}_{file.path.suffix[1:]}")}
    return [i.path for i in files if (match := result.fullmatch(i.path.stem)) and match[1] in sources]


def _by_name(found: dict[str, list[Input]], given: dict[str, str], names: list[str]) -> list[dict[str, Input]]:
    own = _own_files(found, names)
    keyed = {name: _by_key(name, files, whole=False) for name, files in own.items()}
    if any(len(files) > 1 for by_key in keyed.values() for files in by_key.values()):
        keyed = {name: _by_key(name, files, whole=True) for name, files in own.items()}
    problems = [
        f"{key}: several {name} files for it: {', '.join(str(file.path) for file in files)}"
        for name, by_key in keyed.items()
        for key, files in by_key.items()
        if len(files) > 1
    ]
    every = sorted(set().union(*keyed.values()))
    for key in every:
        present = next(by_key[key][0].path for by_key in keyed.values() if key in by_key)
        problems += [f"{present}: no {name} file for it in {given[name]}" for name in keyed if key not in keyed[name]]
    if problems:
        more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        if own != found:  # one folder, and who knows what else is in it
            more += ["patterns leave other files out: input='folder/*_mic.wav' far='folder/*_lpb.wav'"]
        raise ConfigError("\n".join(problems[:_MAX_SHOWN] + more))
    return [{name: by_key[key][0] for name, by_key in keyed.items()} for key in every]


def _own_files(found: dict[str, list[Input]], names: list[str]) -> dict[str, list[Input]]:
    """Without the files whose ending says that they hold another signal, or that an earlier signal has taken."""
    own: dict[str, list[Input]] = {}
    taken: set[Path] = set()
    for name, files in found.items():
        foreign = tuple(ending for other in names if other != name for ending in _ENDINGS.get(other, ()))
        own[name] = [i for i in files if not i.path.stem.endswith(foreign) and i.path.resolve() not in taken]
        taken |= {i.path.resolve() for i in own[name]}
    return own


def _by_key(name: str, files: list[Input], *, whole: bool) -> dict[str, list[Input]]:
    """Files by what they are paired by. *whole*: with their place below the folder."""
    keyed: dict[str, list[Input]] = {}
    for file in files:
        stem = _without_ending(file.path.stem, name)
        key = PurePosixPath(file.name).with_name(stem).as_posix() if whole else stem
        keyed.setdefault(key, []).append(file)
    return keyed


def _without_ending(stem: str, name: str) -> str:
    ending = next((ending for ending in _ENDINGS.get(name, ()) if stem.endswith(ending)), "")
    return stem.removesuffix(ending) or stem


def _output_name(file: Input, name: str) -> str:
    """That of the file, its ending taken off; what follows the file's own name (the part that is meant) stays."""
    place, stem = PurePosixPath(file.name), file.path.stem
    return place.with_name(_without_ending(stem, name) + place.name.removeprefix(stem)).as_posix()


def _echo_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest of echo recordings; of anything else none."""
    if not is_manifest(path):
        return []
    rows = read_manifest(path, required=())
    return read_manifest(path, required=("mic_filepath",)) if any(map(is_echo, rows)) else []


def _of_rows(rows: list[dict[str, Any]], manifest: Path) -> dict[str, Signals]:
    """Both signals of each row, and silence for the far end of near-end recordings that have none."""
    root = common_folder(rows, "mic_filepath")
    jobs: dict[str, Signals] = {}
    for row in rows:
        line = manifest.parent / row[LINE_KEY]
        if "farend_filepath" not in row and row.get("scenario") != "near_end":
            raise ManifestError(
                f"{line}: key 'farend_filepath' is missing; add it, or scenario near_end, or type far=…"
            )
        mic = of_row(row, "mic_filepath", root)
        far = of_row(row, "farend_filepath", Path(row["farend_filepath"]).parent) if "farend_filepath" in row else None
        signals: Signals = {"mic": mic, "far": far}
        name = _output_name(mic, "mic")
        if jobs.setdefault(name, signals) != signals:
            raise ConfigError(f"{line}: would be written as {name}, as another row before it; make two manifests")
    return jobs
