"""Writing checkpoints, finding the one to continue from, and saying what a resumed run does not take over.

A checkpoint appears whole or not at all: it is written beside its target, flushed to the disk and renamed. Reading
is models/checkpoint.py. What a disk does not take is noted here, and callbacks/saving.py decides with all ranks.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from launch.errors import ConfigError
from launch.options import default_options
from launch.run_dir import LAST, newest_run
from launch.targets import DATASETS
from models.base import System
from models.checkpoint import CheckpointError, checked, find_class, read_checkpoint, read_plain, read_trained, tensors

log = logging.getLogger(__name__)

# Lightning's launcher hands the weights of processes that it started by spawn or fork to their parent in such a file.
_BETWEEN_PROCESSES = ".temp.ckpt"
# Of all systems, beside their own `of_training`: beginnings of keys that have no say in what the weights are.
_OF_TRAINING = ("optim", "compile", "loss.", "scores", "restore_from", *DATASETS)
# What _report_change does not tell: the data section's copy of the model's, and a file that a resume does not read.
_TOLD_ELSEWHERE = ("model.restore_from", *(f"data.{name}." for name in DATASETS))


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


def to_continue(path: str | Path) -> Path:
    """The checkpoint to continue from: a file, or what the newest run in a directory would be resumed from."""
    path = Path(path)
    if not path.is_dir():
        return path
    run = newest_run(path)
    found = None if run is None else newest_readable(run)
    if found is None:
        raise CheckpointError(f"{path}: a directory without a checkpoint in it that can be read")
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


def start_from_weights(system: System, path: str, include: list[str] | None, exclude: list[str]) -> None:
    """Weights only, by name and shape, with a report of what did not match and of what they were trained for.

    The file is a checkpoint of ours, or weights of another implementation that the system can import.
    """
    content = read_plain(locate(path))
    own = "format_version" in content
    try:
        state = checked(content, path)["state_dict"] if own else tensors(system.import_weights(content), path)
    except CheckpointError:  # names the file itself
        raise
    except ValueError as error:
        raise ConfigError(f"init_from={path}: {error}") from error
    report = system.load_weights(state, include=include, exclude=exclude)
    if not report["loaded"]:
        raise ConfigError(f"init_from={path}: none of its {len(state)} weights fits this system")
    log.info("init_from=%s: %d weights taken", path, len(report["loaded"]))
    for kind in ("missing", "unexpected", "mismatched"):
        if names := report[kind]:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            log.info("  %s: %s%s", kind, ", ".join(names[:10]), more)
    for line in _other_meaning(content, system) if own else ():
        log.warning("init_from: %s", line)


def _other_meaning(content: dict[str, Any], system: System) -> list[str]:
    """A line for each argument that the weights of a checkpoint were trained with and that is another one here."""
    described = content.get("system")
    own_name = f"{type(system).__module__}.{type(system).__qualname__}"
    if not isinstance(described, dict) or described.get("name") != own_name:
        return []
    old, new = _flat(described.get("arguments") or {}), _flat(dict(system.hparams))
    return [
        f"trained with model.{key}={old[key]}; here it is {new[key]}"
        for key in sorted(old.keys() & new.keys())
        if _plain(old[key]) != _plain(new[key]) and not key.startswith((*_OF_TRAINING, *system.of_training))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def take_over(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Bring a resumed run's configuration in line with what its checkpoint decides, and say what has changed.

    The optimiser and its schedule are part of the state that a resume restores, so `config["model"]["optim"]` becomes
    the checkpoint's; only values that `resume_override` names stay as typed. Returns those, name -> value.
    *saved*: the configuration in the checkpoint.

    Raises ConfigError for a name that cannot be forced.
    """
    old, new = _flat(saved), _flat(config)
    forced = {}
    for name in config["resume_override"]:
        key = "model." + name.removeprefix("model.")
        if not key.startswith("model.optim.") or key.startswith("model.optim.sched.") or key not in new:
            raise ConfigError(f"resume_override={name}: only values of the optimiser can be forced, such as optim.lr")
        forced[key.removeprefix("model.optim.")] = new[key]
    for key in sorted(key for key in old.keys() & new.keys() if old[key] != new[key]):
        _report_change(key, old[key], new[key], forced, str(config["trainer"]["default_root_dir"]))
    if optim := saved.get("model", {}).get("optim"):
        config["model"]["optim"] = {**optim, **forced}
    return forced


def _report_change(key: str, old: Any, new: Any, forced: dict[str, Any], directory: str) -> None:
    if not key.startswith(("model.", "data.", "trainer.", "callbacks.", "monitor.", "seed")):
        return
    if str(new).startswith(directory) or key.startswith(_TOLD_ELSEWHERE):
        return  # the run directory itself
    name = key.removeprefix("model.optim.")
    if name == key or name in forced:
        log.info("changed since the checkpoint: %s=%s (was %s)", key, new, old)
    else:
        hint = "" if name.startswith("sched.") else f"; resume_override=[optim.{name}] forces it"
        log.warning("%s=%s is NOT taking effect: the checkpoint's %s goes on%s", key, new, old, hint)


def restructure(system: System, structure: list[dict[str, Any]], path: Path) -> None:
    """Give a system the layers that the checkpoint *path* was written with. Raises CheckpointError if it cannot."""
    try:
        system.restructure(structure)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the weights in a state dict."""
    return {name: tensor.shape for name, tensor in state.items()}


def refuse_other_network(path: Path, saved: dict[str, Any], config: dict[str, Any], system: System) -> NoReturn:
    """Raises ConfigError that names the model keys by which a checkpoint's configuration *saved* differs."""
    old, new = _flat(saved.get("model", {})), _flat(config["model"])
    beside = (*_OF_TRAINING, *system.of_training)
    keys = sorted(key for key in old.keys() & new.keys() if old[key] != new[key] and not key.startswith(beside))
    named = ", ".join(f"model.{key}={new[key]} (checkpoint: {old[key]})" for key in keys) or "another system"
    raise ConfigError(f"{path} holds a network of another shape: {named}; init_from= takes what fits")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
