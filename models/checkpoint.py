"""Reading a checkpoint of format 1 without trusting it.

A checkpoint is data: `torch.load(weights_only=True)` builds containers and tensors only, and the one class name in it
(the system's) is looked up in our own packages, or in those that the caller names. Writing is launch/checkpoint.py.

Keys of format 1 beside Lightning's own (`state_dict`, `optimizer_states`, `loops`, `callbacks`, …):

* `format_version`: 1
* `system`: `{name: "models.conv_tasnet.ConvTasNet", arguments: {…}}`
* `structure`: changes of the module tree, `[{change: low_rank, ranks: {layer: rank}}]`; empty for a system as
  constructed
* `config`: the resolved configuration of the run · `overrides`: what was typed · `plan`: plan.json
* `versions`: of Python and the packages · `git`: the commit, where there is one
"""

import functools
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.base import System
from models.bounded import bounded
from models.nemo import is_nemo, read_nemo
from models.nest_archive import as_checkpoint
from models.plain import CheckpointError, load_plain

Kind = TypeVar("Kind")
OWN_PACKAGES = ("models", "data", "callbacks")
LIBRARY_PACKAGES = ("pytorch_lightning.callbacks", "pytorch_lightning.loggers")
_MAX_NAMED = 3
_LFS_HEAD = b"version https://git-lfs"


def find_class(target: str, kind: type[Kind], packages: Sequence[str] = ()) -> type[Kind]:
    """The class that a dotted name stands for, if it is a `kind` defined inside an allowed package.

    *packages*: allowed beside our own; only what a user typed may stand here, never what a file says.

    Raises ValueError for every other name, before anything is imported where the package is not allowed.
    """
    allowed = (*OWN_PACKAGES, *LIBRARY_PACKAGES, *packages)
    module_name, _, class_name = str(target).rpartition(".")
    if not _inside(module_name, allowed):
        raise ValueError(f"{target}: not in an allowed package ({', '.join(allowed)}); packages=[…] allows others")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ValueError(f"{target}: cannot be imported ({error})") from error
    except AttributeError:
        raise ValueError(f"{target}: module {module_name} has no {class_name}") from None
    # The module of a name is no proof: `models.base.pl` and everything below it is reachable from an allowed module.
    if not (inspect.isclass(found) and issubclass(found, kind) and _inside(found.__module__, allowed)):
        raise ValueError(f"{target}: not a {kind.__name__} of an allowed package")
    return found


def _inside(module_name: str, packages: Sequence[str]) -> bool:
    return any(module_name == package or module_name.startswith(package + ".") for package in packages)


def read_plain(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of any file that torch.save wrote, as long as it is plain containers and tensors; of a `.nemo`
    archive, what `models.nemo.read_nemo` makes of it.

    Raises CheckpointError, in one line, for a file that is missing, damaged, or that holds anything else; nothing in it
    is run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if reason := _other_kind(path):
        raise CheckpointError(f"{path}: {reason}")
    if is_nemo(path):
        return read_nemo(path, map_location=map_location)
    return load_plain(path, path, map_location=map_location)


def _other_kind(path: Path) -> str | None:
    """What to do about a file that torch cannot read, by its first bytes; None for all others."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if head == _LFS_HEAD:
        return "is a Git-LFS pointer; run `git lfs pull` where it came from"
    if path.suffix == ".safetensors" or head[8:10] == b'{"':  # after the length of its header, JSON
        return (
            "is a safetensors file; convert it:"
            " torch.save(safetensors.torch.load_file(<file>), <file>.pth), then name that one"
        )
    return None


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The plain content of a training checkpoint.

    Raises CheckpointError as `read_plain` does, and for a file without weights or of a newer format.
    """
    return checked(read_plain(path, map_location=map_location), path)


def read_trained(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The plain content of a training checkpoint, or a `.nemo` archive's in the form of one: all that `build_system`
    needs.

    Raises CheckpointError as `read_checkpoint` and `models.nest_archive.as_checkpoint` do.
    """
    content = read_plain(path, map_location=map_location)
    return checked(as_checkpoint(content, path) if "model_config" in content else content, path)


def checked(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The content of the file `path` if it is that of a training checkpoint; raises as `read_checkpoint` does."""
    if "state_dict" not in content:
        raise CheckpointError(f"{path}: not a training checkpoint (no state_dict in it)")
    if "model_config" in content:
        raise CheckpointError(
            f"{path}: an archive of weights without a training state: train.py model.restore_from={path} goes on from"
            " its weights"
        )
    version = content.get("format_version")
    if version is not None and not isinstance(version, int):
        raise CheckpointError(f"{path}: format_version in it is a {type(version).__name__}, not a number")
    if version is not None and version > System.FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}; this version reads up to {System.FORMAT_VERSION}, update it"
        )
    tensors(content["state_dict"], path)
    _section(_section(content, "system", path), "arguments", path)
    _section(_section(content, "config", path), "model", path)
    return content


def tensors(state: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict that was found in the file `path`. Raises CheckpointError when it is none."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: state_dict in it is a {type(state).__name__}, not names with tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(f"{path}: {name!r} in its state_dict is a {type(tensor).__name__}, not a tensor")
    return state


def _section(content: dict[str, Any], key: str, path: str | Path) -> dict[str, Any]:
    section = content.get(key) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: {key} in it is a {type(section).__name__}, not keys with values")
    return section


def build_system(content: dict[str, Any], path: str | Path, packages: Sequence[str] = ()) -> System:
    """The system that a checkpoint's content describes, with its weights, in evaluation mode."""
    described = content.get("system")
    if content.get("format_version") is None or not isinstance(described, dict):
        raise CheckpointError(f"{path}: not written by this framework (no format_version); init_from reads weights")
    with bounded(content["state_dict"], path):
        try:
            system = find_class(described["name"], System, packages)(**described["arguments"])
            system.restructure(content.get("structure") or [])
            _load_all(system, content["state_dict"])
        except (ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
            raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
    for name, weight in system.named_parameters():
        if content["state_dict"][name].is_complex() and not weight.is_complex():
            raise CheckpointError(f"{path}: {name} in it is complex, a real weight is needed")
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: {name} in it holds NaN or infinite values; take an earlier checkpoint")
    return system.eval()


def _load_all(system: System, state: dict[str, Tensor]) -> None:
    """Raises ValueError, in one line, where the weights are not exactly the system's."""
    own = system.state_dict()
    named = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "mismatched": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    for kind, names in named.items():
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ValueError(f"{kind} weights: {', '.join(names[:_MAX_NAMED])}{more}")
    system.load_state_dict(state)


def load(path: str | Path, *, packages: Sequence[str] = (), map_location: Any = "cpu", cached: bool = False) -> System:
    """A trained system from its checkpoint, or from a `.nemo` archive: `load("x.ckpt").predict(x, sample_rate=16000)`.

    *packages*: packages of your own that the system's class may come from. *map_location*: the device that it is on.
    *cached*: the same object again as long as the file (its place, time and size), the device and the packages are the
    same; the last four are kept. It is shared: predict with it, do not train, change or move it.

    Raises CheckpointError as `read_trained` and `build_system` do.
    """
    if not cached:
        return build_system(read_trained(path, map_location=map_location), path, packages).to(map_location)
    file = Path(path).resolve()
    if not file.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    stat = file.stat()
    return _load_cached(file, stat.st_mtime_ns, stat.st_size, torch.device(map_location), tuple(packages))


@functools.lru_cache(maxsize=4)
def _load_cached(file: Path, mtime_ns: int, size: int, device: torch.device, packages: tuple[str, ...]) -> System:
    return load(file, packages=packages, map_location=device)
