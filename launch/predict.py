"""A checkpoint and files -> files. Reading and writing are here; what happens to a signal is `System.predict`."""

import glob
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.audio import AUDIO_SUFFIXES, audio_info, read_audio, write_audio
from data.errors import DataError
from data.manifest import read_manifest
from launch import checkpoint
from launch.build import plain
from launch.errors import ConfigError
from launch.hardware import quieten, torch_device
from models.base import System
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)

# Endings that say which signal of a pair a file holds, as the AEC-Challenge has them: x_mic.wav belongs to x_lpb.wav.
_ROLE_ENDINGS = ("_mic", "_lpb", "_farend")


def run(cfg: DictConfig) -> None:
    """Predict for every file of `input` and write the results below `output`.

    A file that cannot be used does not stop the others; they are listed at the end (exit code 2).
    """
    quieten()
    config = plain(cfg)
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_checkpoint(path), path, config["packages"])
    system.to(torch_device(str(config["device"])))
    own = {"ckpt_path", "input", "output", "device", "packages", *system.inputs}
    options = {name: value for name, value in config.items() if name not in own}
    jobs = pair_files(system, config)
    problems = []
    for stem, files in jobs.items():
        try:
            written = predict_files(system, files, Path(config["output"]), stem, options)
        except DataError as error:
            problems.append(str(error))
            continue
        log.info("%s -> %s", ", ".join(map(str, files.values())), ", ".join(map(str, written)))
    log.info("%d of %d done", len(jobs) - len(problems), len(jobs))
    if problems:
        raise ConfigError("\n".join(problems))


def pair_files(system: System, config: dict[str, Any]) -> dict[str, dict[str, Path]]:
    """Output stem -> {signal: file}. Several signals are paired by file name, role endings taken off.

    Raises ConfigError naming what is missing: no files, a signal that is not given, or a file without its partner.
    """
    names = list(system.inputs)
    given = {names[0]: config["input"], **{name: config.get(name) for name in names[1:]}}
    if missing := [name for name, value in given.items() if value is None]:
        raise ConfigError(f"set {', '.join(f'{name}=…' for name in missing)}: {type(system).__name__} needs it")
    found = {name: list_files(str(value), system.inputs[name]) for name, value in given.items()}
    if len(names) == 1:
        return dict(zip(_distinct_stems(found[names[0]]), ({names[0]: f} for f in found[names[0]]), strict=True))
    by_key = {name: {_pairing_key(file): file for file in files} for name, files in found.items()}
    every = set().union(*by_key.values())
    lonely = [
        f"{key}: no {name} file for it in {given[name]}" for name in names for key in sorted(every - set(by_key[name]))
    ]
    if lonely:
        raise ConfigError("\n".join(lonely))
    return {key: {name: by_key[name][key] for name in names} for key in sorted(every)}


def _pairing_key(file: Path) -> str:
    stem = file.stem
    for ending in _ROLE_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def _distinct_stems(files: list[Path]) -> list[str]:
    """Output names: the stem, or as much of the path as tells files of equal stems apart."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    names = ["_".join(file.with_suffix("").parts[-3:]).replace("/", "") for file in files]
    if len(set(names)) < len(names):
        raise ConfigError("input: several files have the same name, so their results would overwrite one another")
    return names


def list_files(where: str, kind: str) -> list[Path]:
    """The files that a user means by a file, a folder (recursive), a glob, or a manifest (.jsonl, .json)."""
    path = Path(where)
    suffixes = _SUFFIXES[kind]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    elif path.suffix in (".jsonl", ".json"):
        files = [Path(row["audio_filepath"]) for row in read_manifest(path, required=("audio_filepath",))]
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(where, recursive=True)) if Path(name).is_file()]
    if not files:
        raise ConfigError(f"{where}: no {kind} file there ({', '.join(sorted(suffixes))})")
    return files


def predict_files(
    system: System, files: dict[str, Path], output: Path, stem: str, options: dict[str, Any]
) -> list[Path]:
    """Read one set of signals, predict, write every output; returns the files written."""
    signals, rate = {}, None
    for name, file in files.items():
        signals[name], own_rate = _READERS[system.inputs[name]](file)
        if rate is not None and own_rate != rate:
            raise DataError(f"{file}: {own_rate} Hz, but its partner has {rate} Hz; bring both to one rate")
        rate = own_rate
    if rate is not None:
        options = {"sample_rate": rate, **options}
    results = system.predict(**signals, **options)
    written = []
    for name, kind in system.outputs.items():
        written += _WRITERS[kind](output, f"{stem}_{name}", results[name].cpu(), rate)
    return written


def _read_audio(file: Path) -> tuple[Tensor, int]:
    rate = audio_info(file).sample_rate
    return read_audio(file, sample_rate=rate), rate


def _write_audio(folder: Path, name: str, signal: Tensor, rate: int | None) -> list[Path]:
    """(T,) one file; (N, T) one file for each, numbered from 1: x_source1.wav, x_source2.wav."""
    assert rate is not None
    tracks = [(name, signal)] if signal.ndim == 1 else list(_numbered(name, signal))
    for track, samples in tracks:
        write_audio(folder / f"{track}.wav", samples, rate)
    return [folder / f"{track}.wav" for track, _ in tracks]


def _numbered(name: str, signal: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{name.removesuffix('s')}{index}", track) for index, track in enumerate(signal, 1)]


def _read_array(file: Path) -> tuple[Tensor, None]:
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False)), None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a .npy array ({str(error).splitlines()[0]})") from error


def _write_array(folder: Path, name: str, array: Tensor, rate: int | None) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", array.numpy(), allow_pickle=False)
    return [folder / f"{name}.npy"]


_SUFFIXES: dict[str, set[str]] = {"audio": set(AUDIO_SUFFIXES), "array": {".npy"}}
_READERS: dict[str, Callable[[Path], tuple[Tensor, int | None]]] = {
    "audio": _read_audio,
    "array": _read_array,
}
_WRITERS: dict[str, Callable[[Path, str, Tensor, int | None], list[Path]]] = {
    "audio": _write_audio,
    "array": _write_array,
}
