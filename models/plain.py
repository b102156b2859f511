"""Files of tensors and plain containers, read without trusting them: torch's own format, from a file or from memory."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch.torch_version import TorchVersion


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def load_plain(source: Path | IO[bytes], name: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of what torch.save wrote, as long as it is a dict of plain containers and tensors.

    *source*: a file, or one that is open or in memory; *name*: what errors call it.

    Raises CheckpointError, in one line, for anything else; nothing in it is run.
    """
    if _unpacked_bytes(source) > _num_bytes(source):
        raise CheckpointError(f"{name}: refused, its records would unpack to more than the file holds")
    try:
        with torch.serialization.safe_globals([TorchVersion]):  # a str, in files of other frameworks
            content = torch.load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{name}: refused, it holds more than plain data ({_cause(error)})") from error
    except Exception as error:  # torch has no error class of its own for a damaged archive
        raise CheckpointError(f"{name}: damaged or not a checkpoint ({_cause(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def _unpacked_bytes(source: Path | IO[bytes]) -> int:
    """What the records of a zip archive claim to hold; torch stores them uncompressed, but would unpack others too."""
    try:
        with zipfile.ZipFile(source) as archive:
            return sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError):  # torch's format before the zip archive, or damaged: torch will tell
        return 0
    finally:
        if not isinstance(source, Path):
            source.seek(0)


def _num_bytes(source: Path | IO[bytes]) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    size = source.seek(0, 2)
    source.seek(0)
    return size


def _cause(error: Exception) -> str:
    """The telling line of torch's long messages, without its advice to ask for support or to trust the file."""
    lines = [re.sub(r"^Please file an issue.*WeightsUnpickler error:", "", line) for line in str(error).splitlines()]
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("Weights only load failed")]
    telling = [line for line in lines if "unsupported" in line.lower()]
    return (telling or lines or [type(error).__name__])[0][:200].rstrip(".")
