"""A checkpoint and files -> files. What happens to a signal is `System.predict`.

A file that cannot be used, or that `predict` refuses, does not stop the others: an option may suit one image and not
the next (a region outside it). What is refused for the same reason is said once, and without names if it is every file.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.audio import audio_info, common_length
from data.errors import DataError
from launch import checkpoint
from launch.build import plain
from launch.errors import ConfigError
from launch.hardware import quieten, torch_device
from launch.inputs import Input
from launch.options import checked_options, described
from launch.pairs import Signals, pair_inputs
from launch.signal_files import read_signal, write_signal
from models.base import System
from models.checkpoint import build_system, read_trained

log = logging.getLogger(__name__)

_MAX_SHOWN = 3


class Refused(Exception):
    """`System.predict` will not have these signals with these options; the message does not name the file."""


def run(cfg: DictConfig) -> None:
    """Predict for every file of `input` and write the results below `output`.

    A file that cannot be used does not stop the others; they are listed at the end (exit code 2).
    """
    quieten()
    config = plain(cfg)
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_trained(path), path, config["packages"])
    system.to(torch_device(str(config["device"])))
    output = Path(config["output"])
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output}: is a file, the name of a folder is needed")
    own = {"ckpt_path", "input", "output", "device", "packages", *system.inputs}
    options = checked_options(system, {name: value for name, value in config.items() if name not in own})
    jobs = pair_inputs(system.inputs, config, outputs=system.outputs)
    files = {name: [source.path for source in signals.values() if source] for name, signals in jobs.items()}
    keep = {file.resolve() for several in files.values() for file in several}
    problems: dict[str, list[Path]] = {}  # and the files that they are about, where they do not name them
    num_done = num_averaged = 0
    for name, signals in jobs.items():
        try:
            with _warnings_named(files[name][0]):
                written = predict_one(system, signals, output / name, options, keep=keep)
        except DataError as error:
            problems.setdefault(str(error), [])
        except Refused as error:
            problems.setdefault(str(error), []).append(files[name][0])
        else:
            num_done += 1
            num_averaged += any(_num_channels(system.inputs[key], signals[key]) > 1 for key in signals)
            log.info("%s -> %s", ", ".join(map(str, files[name])), ", ".join(map(str, written)))
    if num_averaged:
        log.info("%d of them with several channels: the mean of the channels was taken", num_averaged)
    log.info("%d of %d done", num_done, len(jobs))
    if problems:
        raise ConfigError("\n".join(_line(text, about, len(jobs)) for text, about in problems.items()))


def _line(problem: str, about: list[Path], num_jobs: int) -> str:
    if len(about) in (0, num_jobs):
        return problem
    more = f" and {len(about) - _MAX_SHOWN} more" if len(about) > _MAX_SHOWN else ""
    return f"{', '.join(map(str, about[:_MAX_SHOWN]))}{more}: {problem}"


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
    """Read one set of signals, predict, write what comes as `<target>_<output>…`; returns the files written.

    *keep*: files that no result may replace.

    Raises DataError for files that cannot be used, alone or together, Refused for what the system says no to.
    """
    signals, rate = _read_signals(system.inputs, inputs)
    try:
        results = system.predict(**signals, **({} if rate is None else {"sample_rate": rate}), **options)
    except ValueError as error:
        given = described(system, options)
        raise Refused(f"{given}: {error}" if given else str(error)) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise Refused(
            "the device's memory is not enough; choose smaller parts (tile and whole_up_to, chunk_s, or a manifest with"
            " offset and duration) or device=cpu"
        ) from error
    written = []
    for name, kind in system.outputs.items():
        if name in results:
            content = results[name]
            if kind == "records":
                content = _facts(system, inputs, signals, results) | {name: content}
            written += write_signal(kind, target, name, content, rate, keep=keep)
    return written


def _facts(system: System, inputs: Signals, signals: dict[str, Tensor], results: dict[str, Any]) -> dict[str, Any]:
    """What stands beside records: the images that they are about, and numbers that results hold, as the threshold."""
    images = {
        name: {"file": str(source.path), "width": signals[name].shape[-1], "height": signals[name].shape[-2]}
        for name, source in inputs.items()
        if source and system.inputs[name] == "image"
    }
    return images | {name: value for name, value in results.items() if isinstance(value, int | float)}


def _read_signals(kinds: dict[str, str], inputs: Signals) -> tuple[dict[str, Tensor], int | None]:
    """The signals and the sample rate of those that are audio; these are cut to equal length, and silence is added."""
    sources = {name: source for name, source in inputs.items() if source}
    read = {name: read_signal(kinds[name], source) for name, source in sources.items()}
    audio = {name: (signal, rate) for name, (signal, rate) in read.items() if rate is not None}
    if not audio:
        return {name: array for name, (array, _) in read.items()}, None
    length = common_length([(sources[name].path, rate, len(signal)) for name, (signal, rate) in audio.items()])
    signals = {name: signal[:length] if name in audio else signal for name, (signal, _) in read.items()}
    return {name: signals.get(name, torch.zeros(length)) for name in inputs}, next(iter(audio.values()))[1]


def _num_channels(kind: str, source: Input | None) -> int:
    return audio_info(source.path).num_channels if source and kind == "audio" else 1
