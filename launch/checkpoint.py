"""Writing checkpoints, finding the one to continue from, and saying what a resumed run does not take over.

A checkpoint appears whole or not at all: it is written beside its target, flushed to the disk and renamed. Reading
is models/checkpoint.py.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from launch.errors import ConfigError
from launch.run_dir import LAST, newest_run
from models.base import System
from models.checkpoint import CheckpointError, find_class, read_checkpoint

log = logging.getLogger(__name__)


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, with the run's record in it, written atomically.

    *record*: keys of format 1 that belong to the run, not to the system: config, overrides, versions, git.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__()
        self.record = record

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        with beside.open("wb") as file:
            torch.save({**checkpoint, **self.record}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(path, map_location=map_location or "cpu")


def remove_leftovers(folder: Path) -> None:
    """Delete half-written files of killed runs in a checkpoint directory."""
    for file in folder.glob("*.ckpt.tmp"):
        file.unlink()


def locate(path: str | Path) -> Path:
    """The checkpoint that a user means by a file, or by a run directory or a folder of runs: the newest run's best."""
    path = Path(path)
    if not path.is_dir():
        return path
    run = newest_run(path)
    if run is None:
        raise CheckpointError(f"{path}: a directory without a checkpoint in it")
    best = sorted((run / "checkpoints").glob("best*.ckpt"), key=lambda file: file.stat().st_mtime)
    found = best[-1] if best else max((run / "checkpoints").glob("*.ckpt"), key=lambda f: f.stat().st_mtime)
    print(f"checkpoint: {found}")
    return found


def run_configuration(path: Path, script: str, packages: list[str]) -> dict[str, Any]:
    """What of a checkpoint's configuration a script takes as the base for typed overrides.

    evaluate: the data section. predict: the options of the system's `predict`, without a prefix, and a key for each
    input signal beside the first, which is `input`. *packages*: as typed; a checkpoint's own are never believed.
    """
    content = read_checkpoint(path)
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no configuration, so it was not written by train.py")
    if script == "evaluate":
        return {"data": config["data"]}
    if script == "predict":
        try:
            system = find_class(content["system"]["name"], System, packages)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return {**(config.get("predict") or {}), **dict.fromkeys(list(system.inputs)[1:])}
    return {}


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
    """Weights only, by name and shape, with a report of what did not match."""
    state = read_checkpoint(locate(path))["state_dict"]
    report = system.load_weights(state, include=include, exclude=exclude)
    if not report["loaded"]:
        raise ConfigError(f"init_from={path}: none of its {len(state)} weights fits this system")
    log.info("init_from=%s: %d weights taken", path, len(report["loaded"]))
    for kind in ("missing", "unexpected", "mismatched"):
        if names := report[kind]:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            log.info("  %s: %s%s", kind, ", ".join(names[:10]), more)


def report_changes(path: Path, system: System, config: dict[str, Any], forced: list[str]) -> dict[str, Any]:
    """Say in what a resumed run's configuration differs from the checkpoint's, and what of it has no effect.

    The optimiser's values are part of the state that a resume restores, so new ones take effect only when *forced*
    names them (`resume_override=[optim.lr]`).

    Returns the forced optimiser values, name -> value. Raises ConfigError for a network of another shape and for
    forced names that cannot be forced.
    """
    content = read_checkpoint(path)
    old, new = _flat(content.get("config") or {}), _flat(config)
    changed = {key for key in old.keys() & new.keys() if old[key] != new[key]}
    own = system.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in content["state_dict"].items()}:
        keys = sorted(key for key in changed if key.startswith("model.") and not key.startswith("model.optim."))
        named = ", ".join(f"{key}={new[key]} (checkpoint: {old[key]})" for key in keys) or "another system"
        raise ConfigError(f"{path} holds a network of another shape: {named}; init_from= takes what fits")
    values = {}
    for name in forced:
        key = "model." + name.removeprefix("model.")
        if not key.startswith("model.optim.") or key.startswith("model.optim.sched.") or key not in new:
            raise ConfigError(f"resume_override={name}: only values of the optimiser can be forced, such as optim.lr")
        values[key.removeprefix("model.optim.")] = new[key]
    for key in sorted(changed):
        if key.startswith(
            ("hydra.", "trainer.default_root_dir", "callbacks.checkpoint.dirpath", "logger.", "ckpt_path")
        ):
            continue
        if key.startswith("model.optim.") and key.removeprefix("model.optim.") not in values:
            hint = (
                ""
                if key.startswith("model.optim.sched.")
                else f"; resume_override=[{key.removeprefix('model.')}] forces it"
            )
            log.warning("%s=%s is NOT taking effect: the checkpoint's %s goes on%s", key, new[key], old[key], hint)
        else:
            log.info("changed since the checkpoint: %s=%s (was %s)", key, new[key], old[key])
    return values


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
