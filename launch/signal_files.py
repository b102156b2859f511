"""Files of each kind of signal - audio, image, array, several arrays, records - to tensors and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from data.audio import atomic_path, audio_info, read_audio, write_audio
from data.errors import DataError
from data.images import read_image, write_png
from launch.inputs import Input
from models.base import Tensors


def read_signal(kind: str, source: Input) -> tuple[Tensor, int | None]:
    """The signal of a file, and its sample rate in Hz where it is audio.

    Audio is `(T,)`, the mean of its channels; an image uint8 `(3, H, W)`, upright; an array what it is.

    Raises DataError for a file that cannot be used.
    """
    return _READERS[kind](source)


def write_signal(kind: str, target: Path, name: str, signal: Any, rate: int | None, *, keep: set[Path]) -> list[Path]:
    """Write one result below the name *target*; returns its files, `<target>_<name>.<suffix>`.

    Audio `(N, T)` becomes a file for each, numbered from 1: x_source1.wav, x_source2.wav. An image, bool or float
    from 0 to 1 `(H, W)` or uint8 `(3, H, W)`, becomes a PNG of 8 bits, records JSON, an array .npy, and `Tensors` a
    safetensors file with the facts as its metadata.

    *keep*: files that no result may replace; others of the same name are.

    Raises DataError for these, and for a file that cannot be written.
    """
    kind = "tensors" if isinstance(signal, Tensors) else kind
    signal = signal.cpu() if isinstance(signal, Tensor) else signal
    tracks = [(f"{name}{_SUFFIXES[kind]}", signal)]
    if kind == "audio" and signal.ndim > 1:
        tracks = [(f"{name.removesuffix('s')}{number}.wav", track) for number, track in enumerate(signal, 1)]
    files = [Path(f"{target}_{ending}") for ending, _ in tracks]
    if lost := [file for file in files if file.resolve() in keep]:
        raise DataError(f"{lost[0]}: this input would be replaced by a result; choose another output folder")
    for file, (_, track) in zip(files, tracks, strict=True):
        _WRITERS[kind](file, track, rate)
    return files


def _read_audio(source: Input) -> tuple[Tensor, int]:
    rate = audio_info(source.path).sample_rate
    return read_audio(source.path, sample_rate=rate, offset_s=source.offset_s, duration_s=source.duration_s), rate


def _write_audio(file: Path, signal: Tensor, rate: int | None) -> None:
    assert rate is not None
    write_audio(file, signal, rate)


def _read_image(source: Input) -> tuple[Tensor, None]:
    pixels = read_image(source.path)  # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), None


def _write_image(file: Path, image: Tensor, rate: int | None) -> None:
    write_png(file, (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy())


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


def _write_tensors(file: Path, content: Tensors, rate: int | None) -> None:
    packed = save({name: tensor.cpu().contiguous() for name, tensor in content.tensors.items()}, content.facts)
    try:
        with atomic_path(file) as temporary:
            temporary.write_bytes(packed)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


def _write_records(file: Path, content: Any, rate: int | None) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


_SUFFIXES = {"audio": ".wav", "image": ".png", "array": ".npy", "tensors": ".safetensors", "records": ".json"}
_READERS: dict[str, Callable[[Input], tuple[Tensor, int | None]]] = {
    "audio": _read_audio,
    "image": _read_image,
    "array": _read_array,
}
_WRITERS: dict[str, Callable[[Path, Any, int | None], None]] = {
    "audio": _write_audio,
    "image": _write_image,
    "array": _write_array,
    "tensors": _write_tensors,
    "records": _write_records,
}
