"""A checkpoint and files -> files. Reading and writing are here; what happens to a signal is `System.predict`."""

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.audio import atomic_path, audio_info, common_length, read_audio, write_audio
from data.errors import DataError
from launch import checkpoint
from launch.build import plain
from launch.errors import ConfigError
from launch.hardware import quieten, torch_device
from launch.inputs import Input
from launch.pairs import Signals, pair_inputs
from models.base import System
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Predict for every file of `input` and write the results below `output`.

    A file that cannot be used does not stop the others; they are listed at the end (exit code 2).
    """
    quieten()
    config = plain(cfg)
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_checkpoint(path), path, config["packages"])
    system.to(torch_device(str(config["device"])))
    output = Path(config["output"])
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output}: is a file, the name of a folder is needed")
    own = {"ckpt_path", "input", "output", "device", "packages", *system.inputs}
    options = {name: value for name, value in config.items() if name not in own}
    check_options(system, options)
    jobs = pair_inputs(system.inputs, config, outputs=system.outputs)
    files = {name: [source.path for source in signals.values() if source] for name, signals in jobs.items()}
    keep = {file.resolve() for several in files.values() for file in several}
    problems, num_averaged = [], 0
    for name, signals in jobs.items():
        try:
            with _warnings_named(files[name][0]):
                written = predict_one(system, signals, output / name, options, keep=keep)
        except DataError as error:
            problems.append(str(error))
            continue
        num_averaged += any(_num_channels(file) > 1 for file in files[name])
        log.info("%s -> %s", ", ".join(map(str, files[name])), ", ".join(map(str, written)))
    if num_averaged:
        log.info("%d of them with several channels: the mean of the channels was taken", num_averaged)
    log.info("%d of %d done", len(jobs) - len(problems), len(jobs))
    if problems:
        raise ConfigError("\n".join(problems))


def check_options(system: System, options: dict[str, Any]) -> None:
    """Raises ConfigError naming each option that `System.predict` does not have, or that is no number and has to be.

    Those are numbers whose default is one, or null, which then is taken too.
    """
    parameters = inspect.signature(system.predict).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = {name: p.default for name, p in parameters.items() if name not in (*system.inputs, "sample_rate")}
    problems = []
    for name, value in options.items():
        if name not in known:
            problems.append(f"{name}: {type(system).__name__} has no such option; it has {', '.join(known) or 'none'}")
        elif _is_number(known[name]) and not _is_number(value):
            problems.append(f"{name} must be a number, got {value!r}")
        elif known[name] is None and value is not None and not _is_number(value):
            problems.append(f"{name} must be a number or null, got {value!r}")
    if problems:
        raise ConfigError("\n".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def _warnings_named(file: Path) -> Iterator[None]:
    """Warnings that are logged meanwhile begin with the file that they are about."""
    make = logging.getLogRecordFactory()

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            record.msg, record.args = f"{file}: {record.getMessage()}", None
        return record

    logging.setLogRecordFactory(named)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def predict_one(
    system: System, inputs: Signals, target: Path, options: dict[str, Any], *, keep: set[Path]
) -> list[Path]:
    """Read one set of signals, predict, write every output as `<target>_<output>…`; returns the files written.

    *keep*: files that no result may replace; others of the same name are.

    Raises DataError for files that cannot be used, alone or together, ConfigError for options that the system refuses.
    """
    signals, rate = _read_signals(system.inputs, inputs)
    try:
        results = system.predict(**signals, **({} if rate is None else {"sample_rate": rate}), **options)
    except ValueError as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
        raise ConfigError(f"{given}: {error}" if given else str(error)) from error
    written = []
    for name, kind in system.outputs.items():
        for file, signal in _tracks(target, name, results[name].cpu(), kind):
            if file.resolve() in keep:
                raise DataError(f"{file}: this input would be replaced by a result; choose another output folder")
            _WRITERS[kind](file, signal, rate)
            written.append(file)
    return written


def _read_signals(kinds: dict[str, str], inputs: Signals) -> tuple[dict[str, Tensor], int | None]:
    """The signals and the sample rate of those that are audio; these are cut to equal length, and silence is added."""
    sources = {name: source for name, source in inputs.items() if source}
    read = {name: _READERS[kinds[name]](source) for name, source in sources.items()}
    audio = {name: (signal, rate) for name, (signal, rate) in read.items() if rate is not None}
    if not audio:
        return {name: array for name, (array, _) in read.items()}, None
    length = common_length([(sources[name].path, rate, len(signal)) for name, (signal, rate) in audio.items()])
    signals = {name: signal[:length] if name in audio else signal for name, (signal, _) in read.items()}
    return {name: signals.get(name, torch.zeros(length)) for name in inputs}, next(iter(audio.values()))[1]


def _tracks(target: Path, name: str, signal: Tensor, kind: str) -> list[tuple[Path, Tensor]]:
    """One file; for audio (N, T) one for each, numbered from 1: x_source1.wav, x_source2.wav."""
    if kind == "audio" and signal.ndim > 1:
        single = name.removesuffix("s")
        return [(Path(f"{target}_{single}{number}.wav"), track) for number, track in enumerate(signal, 1)]
    return [(Path(f"{target}_{name}{_SUFFIXES[kind]}"), signal)]


def _num_channels(file: Path) -> int:
    return 1 if file.suffix == ".npy" else audio_info(file).num_channels


def _read_audio(source: Input) -> tuple[Tensor, int]:
    rate = audio_info(source.path).sample_rate
    return read_audio(source.path, sample_rate=rate, offset_s=source.offset_s, duration_s=source.duration_s), rate


def _write_audio(file: Path, signal: Tensor, rate: int | None) -> None:
    assert rate is not None
    write_audio(file, signal, rate)


def _read_array(source: Input) -> tuple[Tensor, None]:
    try:
        return torch.from_numpy(np.load(source.path, allow_pickle=False)), None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{source.path}: not a .npy array ({str(error).splitlines()[0]})") from error


def _write_array(file: Path, array: Tensor, rate: int | None) -> None:
    try:
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, array.numpy(), allow_pickle=False)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


_SUFFIXES = {"audio": ".wav", "array": ".npy"}
_READERS: dict[str, Callable[[Input], tuple[Tensor, int | None]]] = {"audio": _read_audio, "array": _read_array}
_WRITERS: dict[str, Callable[[Path, Tensor, int | None], None]] = {"audio": _write_audio, "array": _write_array}
