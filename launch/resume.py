"""Continuing from a checkpoint: from which, what of the command line it decides, and what is refused."""

import logging
from pathlib import Path
from typing import Any, NoReturn

from launch import micro_batch
from launch.checkpoint import flat, is_of_training, newest_readable
from launch.errors import ConfigError
from launch.run_dir import newest_run, restarts
from launch.targets import DATASETS
from models.base import System
from models.checkpoint import CheckpointError, read_checkpoint

log = logging.getLogger(__name__)

# What _report_change does not tell: the data section's copy of the model's, and a file that a resume does not read.
_TOLD_ELSEWHERE = ("model.restore_from", *(f"data.{name}." for name in DATASETS))

# Of the section of an optimiser, what is no value of it.
_NO_VALUES = ("model.optim.sched.", "model.optim.scale_lr_")


def find(config: dict[str, Any], directory: Path) -> Path | None:
    """The checkpoint whose full state a run in *directory* continues from; the run's first line says which.

    Raises ConfigError where there must be one and is none, CheckpointError for one that cannot be read.
    """
    section = config["exp_manager"]
    again = restarts() or micro_batch.is_another_attempt()
    own = None
    if again or (section["resume_if_exists"] and not config["ckpt_path"]):
        own = newest_readable(directory)
    if own is not None:
        if not (again or section["resume_past_end"]) and is_complete(own):
            raise ConfigError(f"exp_manager.resume_past_end=false: the run of {own} is complete")
        log.info("started anew, resuming %s" if again else "resuming %s", own)
        return own
    if given := config["ckpt_path"] or section["resume_from_checkpoint"]:
        path = to_continue(given)
        log.info("continuing from %s in %s", path, directory)
        return path
    if section["resume_if_exists"] and not section["resume_ignore_no_checkpoint"]:
        raise ConfigError(f"exp_manager.resume_ignore_no_checkpoint=false: no checkpoint in {directory}")
    new = "nothing to resume, a new run: %s" if section["resume_if_exists"] else "run directory: %s"
    log.info(new, directory)
    return None


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


def is_complete(path: Path) -> bool:
    """Whether the training that wrote a checkpoint has ended by itself: at its last step or epoch, or stopped early."""
    content = read_checkpoint(path)
    section = (content.get("config") or {}).get("trainer") or {}
    done = {"max_steps": content.get("global_step", 0), "max_epochs": content.get("epoch", 0)}
    limits = {key: section.get(key) for key in done}
    early = any(
        isinstance(state, dict) and state.get("stopped_epoch") for state in (content.get("callbacks") or {}).values()
    )
    return early or any(limit is not None and 0 <= limit <= done[key] for key, limit in limits.items())


def refuse_weights_alone(path: Path, content: dict[str, Any]) -> None:
    """Raises ConfigError for a checkpoint without a state of training."""
    if "optimizer_states" not in content:
        raise ConfigError(f"{path}: holds weights alone, so it cannot be continued; init_from= takes them")


def take_over(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Bring a resumed run's configuration in line with what its checkpoint decides, and say what has changed.

    The optimiser and its schedule are part of the state that a resume restores, so `config["model"]["optim"]` becomes
    the checkpoint's; only values that `resume_override` names stay as typed. Returns those, name -> value.
    *saved*: the configuration in the checkpoint.

    Raises ConfigError for a name that cannot be forced.
    """
    old, new = flat(saved), flat(config)
    forced = {}
    for name in config["resume_override"]:
        key = "model." + name.removeprefix("model.")
        if not key.startswith("model.optim.") or key.startswith(_NO_VALUES) or key not in new:
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
        hint = "" if key.startswith(_NO_VALUES) else f"; resume_override=[optim.{name}] forces it"
        log.warning("%s=%s is NOT taking effect: the checkpoint's %s goes on%s", key, new, old, hint)


def refuse_other_network(path: Path, saved: dict[str, Any], config: dict[str, Any], system: System) -> NoReturn:
    """Raises ConfigError that names the model keys by which a checkpoint's configuration *saved* differs."""
    old, new = flat(saved.get("model", {})), flat(config["model"])
    keys = sorted(k for k in old.keys() & new.keys() if old[k] != new[k] and not is_of_training(k, system))
    named = ", ".join(f"model.{key}={new[key]} (checkpoint: {old[key]})" for key in keys) or "another system"
    raise ConfigError(f"{path} holds a network of another shape: {named}; init_from= takes what fits")
