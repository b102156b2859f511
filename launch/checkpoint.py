"""Writing checkpoints, and finding them; what continuing from one means is launch/resume.py.

A checkpoint appears whole or not at all: it is written beside its target, flushed to the disk and renamed. Reading
is models/checkpoint.py. What a disk does not take is noted here, and callbacks/saving.py decides with all ranks.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from launch.options import default_options
from launch.run_dir import LAST, newest_run
from launch.targets import DATASETS
from models.base import System
from models.checkpoint import CheckpointError, find_class, read_checkpoint, read_plain, read_trained

log = logging.getLogger(__name__)

# Lightning's launcher hands the weights of processes that it started by spawn or fork to their parent in such a file.
_BETWEEN_PROCESSES = ".temp.ckpt"
# Of all systems, beside their own `of_training`: beginnings of keys that have no say in what the weights are.
_OF_TRAINING = ("optim", "compile", "gradient_checkpointing", "loss.", "scores", "restore_from", *DATASETS)


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, with the run's record in it, written atomically.

    *record*: keys of format 1 that belong to the run, not to the system: config, overrides, versions, git.
    *save_archive*: writes the weights in another format; called with `<name>.nemo` for each best checkpoint. The
    archive goes when its checkpoint does. *system*: takes the layers of what another process has trained.
    *stop_on_full_disk*: whether the run is to stop when a checkpoint cannot be written.

    Attribute `failure`: why the last checkpoint was not written; None: it was.
    """

    def __init__(
        self,
        record: dict[str, Any],
        save_archive: Callable[[Path], None] | None = None,
        system: System | None = None,
        *,
        stop_on_full_disk: bool = True,
    ) -> None:
        super().__init__()
        self.record = record
        self.save_archive = save_archive
        self.system = system
        self.stop_on_full_disk = stop_on_full_disk
        self.failure: str | None = None
        self._failed_before = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        if path.name == _BETWEEN_PROCESSES:  # Lightning gives the weights alone, and would load what fits of them
            structure = self.system.structure if self.system else []
            return super().save_checkpoint({"state_dict": checkpoint, "structure": structure}, path)
        self.failure = None
        try:
            _write_whole(path, {**checkpoint, **self.record})
        except Exception as error:
            cause = _error_of_the_disk(error)
            if cause is None:
                raise
            self.failure = _not_saved(path, cause)
        else:
            if self._failed_before:
                log.info("%s is saved: the disk takes checkpoints again", _shown(path))
            if self.save_archive is not None and path.name != LAST.name:
                self._archive(path.with_suffix(".nemo"))
        self._failed_before = self.failure is not None

    def _archive(self, path: Path) -> None:
        assert self.save_archive is not None
        try:
            self.save_archive(path)
        except OSError as error:  # the checkpoint is there, and holds all that the archive would
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
            log.warning("%s", _not_saved(path, error))

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        Path(path).with_suffix(".nemo").unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        if Path(path).name != _BETWEEN_PROCESSES:
            return read_checkpoint(path, map_location=map_location or "cpu")
        content = read_plain(path, map_location=map_location or "cpu")
        if self.system:
            self.system.restructure(content["structure"])
        return content["state_dict"]


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that failed may not let it be removed; the next start tries again
            beside.unlink(missing_ok=True)
        raise


def _error_of_the_disk(error: BaseException | None) -> OSError | None:
    """What the disk answered: torch reports an archive that it cannot end, on top of the error that is the cause."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _not_saved(path: Path, error: OSError) -> str:
    """One line: which file, why, how much is free and how much is needed."""
    reason = error.strerror or str(error)
    sizes = {file.stat().st_mtime: file.stat().st_size for file in path.parent.glob(f"*{path.suffix}")}
    before = f", the one before has {sizes[max(sizes)] / 2**20:.1f} MiB" if sizes else ""
    free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free
    return f"{_shown(path)} could not be written ({reason}): {free / 2**20:.1f} MiB are free{before}"


def _shown(path: Path) -> Path:
    return Path(path.parent.name) / path.name


def remove_leftovers(folder: Path) -> None:
    """Delete half-written files of killed runs in a checkpoint directory."""
    for kind in ("ckpt", "nemo"):
        for file in folder.glob(f"*.{kind}.tmp"):
            file.unlink()


def locate(path: str | Path) -> Path:
    """The checkpoint that a user means by a file, or by a run directory or a folder of runs: the newest run's best."""
    path = Path(path)
    if not path.is_dir():
        return path
    run = newest_run(path)
    if run is None:
        raise CheckpointError(f"{path}: a directory without a checkpoint in it")
    files = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    best = [file for file in files if file.name != LAST.name]
    found = (best or files)[-1]
    print(f"checkpoint: {found}")
    return found


def run_configuration(path: Path, script: str, packages: list[str]) -> dict[str, Any]:
    """What of a checkpoint's configuration a script takes as the base for typed overrides.

    evaluate: the data section, and what the system lets one choose there. export: the data section. predict: the
    options of the system's `predict`, without a prefix, and a key for each input signal beside the first, which is
    `input`. An archive has no configuration: an empty data section, and options at their defaults. *packages*: as
    typed; a checkpoint's own are never believed.
    """
    content = (read_checkpoint if script == "evaluate" else read_trained)(path)
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no configuration, so it was not written by train.py")
    if script == "export":
        return {"data": config["data"]}
    if script not in ("evaluate", "predict"):
        return {}
    system = system_class(content, path, packages)
    if script == "evaluate":
        arguments = content["system"]["arguments"]
        chosen = {key: arguments[key] for key in system.chosen_in_evaluation if key in arguments}
        return {"data": config["data"], "model": chosen}
    return {**default_options(system), **(config.get("predict") or {}), **dict.fromkeys(list(system.inputs)[1:])}


def system_class(content: dict[str, Any], path: Path, packages: list[str]) -> type[System]:
    """The class of the system in a checkpoint's content. Raises CheckpointError when there is none to be had."""
    try:
        return find_class(content["system"]["name"], System, packages)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def newest_readable(folder: Path) -> Path | None:
    """The checkpoint of a run directory to continue from: last.ckpt, else the newest that opens; skipped ones named."""
    last = folder / LAST
    others = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in [last, *(other for other in others if other != last)]:
        if not file.exists():
            continue
        try:
            read_checkpoint(file)
        except CheckpointError as error:
            log.warning("skipped %s", error)
        else:
            return file
    return None


def restructure(system: System, structure: list[dict[str, Any]], path: Path) -> None:
    """Give a system the layers that the checkpoint *path* was written with. Raises CheckpointError if it cannot."""
    try:
        system.restructure(structure)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the weights in a state dict."""
    return {name: tensor.shape for name, tensor in state.items()}


def is_of_training(key: str, system: System) -> bool:
    """Whether a key of the model section has no say in what the weights are, nor in what they mean."""
    return key.startswith((*_OF_TRAINING, *system.of_training))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts under their dotted keys."""
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in flat(child, f"{prefix}{name}.").items()}
