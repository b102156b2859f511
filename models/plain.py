"""Files of tensors and plain containers, read without trusting them: torch's own format, from a file or from memory."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch.torch_version import TorchVersion

# Where Lightning puts the arguments of a system; those of NeMo and others are configuration objects of OmegaConf.
_ARGUMENTS = ("hyper_parameters", "hparams_type")
_OF_NODES = (
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{t.__name__}" for t in (dict, list, int, float, str, bool)),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def load_plain(source: Path | IO[bytes], name: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of what torch.save wrote, as long as it is a dict of plain containers and tensors.

    Configuration objects, which Lightning's checkpoints of other frameworks hold, are left out with what they hold.

    *source*: a file, or one that is open or in memory; *name*: what errors call it.

    Raises CheckpointError, in one line, for anything else; nothing in it is run.
    """
    if _unpacked_bytes(source) > _num_bytes(source):
        raise CheckpointError(f"{name}: refused, its records would unpack to more than the file holds")
    try:
        left_out = _configuration_classes(source)
        # TorchVersion: a str, in files of other frameworks.
        with torch.serialization.safe_globals([TorchVersion, *((_LeftOut, name) for name in left_out)]):
            content = torch.load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{name}: refused, it holds more than plain data ({_cause(error)})") from error
    except Exception as error:  # torch has no error class of its own for a damaged archive
        raise CheckpointError(f"{name}: damaged or not a checkpoint ({_cause(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: holds a {type(content).__name__}, not a checkpoint or a state dict")
    return {key: value for key, value in content.items() if not (left_out and key in _ARGUMENTS)}


class _LeftOut:
    """Stands for any configuration object, and keeps nothing of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_LeftOut":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0


def _configuration_classes(source: Path | IO[bytes]) -> list[str]:
    """The classes of OmegaConf in a file, and what its nodes refer to; nothing of them is imported or run."""
    named = []
    if zipfile.is_zipfile(source):
        _rewind(source)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    _rewind(source)
    own = [name for name in named if name.startswith("omegaconf.")]
    return [*own, *(name for name in named if own and name in _OF_NODES)]


def _unpacked_bytes(source: Path | IO[bytes]) -> int:
    """What the records of a zip archive claim to hold; torch stores them uncompressed, but would unpack others too."""
    try:
        with zipfile.ZipFile(source) as archive:
            return sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError):  # torch's format before the zip archive, or damaged: torch will tell
        return 0
    finally:
        _rewind(source)


def _rewind(source: Path | IO[bytes]) -> None:
    if not isinstance(source, Path):
        source.seek(0)


def _num_bytes(source: Path | IO[bytes]) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    size = source.seek(0, 2)
    _rewind(source)
    return size


def _cause(error: Exception) -> str:
    """The telling line of torch's long messages, without its advice to ask for support or to trust the file."""
    lines = [re.sub(r"^Please file an issue.*WeightsUnpickler error:", "", line) for line in str(error).splitlines()]
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("Weights only load failed")]
    telling = [line for line in lines if "unsupported" in line.lower()]
    return (telling or lines or [type(error).__name__])[0][:200].rstrip(".")
