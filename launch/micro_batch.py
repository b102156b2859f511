"""A batch that memory is too small for: halved with twice the accumulation, for good.

Decisions that are not obvious
* Any process may be the one that runs out, and it cannot ask the others, who wait for it in an exchange. So it writes
  plan.json itself and ends; the others fail in their exchange. All read plan.json when they start again.
* The first process starts again without ending, and so do those that Lightning starts for it. Processes of torchrun
  or srun end with 1, and it is for the launcher to start them again.
* A decision names the values that it was taken for. Where others are configured, it is not followed.
"""

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

from callbacks.out_of_memory import OutOfMemory, divided, is_out_of_memory
from data.base import SystemData
from launch import ranks
from launch.errors import ConfigError

log = logging.getLogger(__name__)

NAME = "micro_batch"
_AGAIN = "RUN_GOES_ON"  # tells the processes of a second attempt that they are
PER_BATCH = ("trainer.val_check_interval", "trainer.limit_train_batches")  # are batches where they are whole numbers

Decision = dict[str, dict[str, Any]]  # key -> {"was": as configured, "is": value that is used}
Again = TypeVar("Again")


def attempts(make: Callable[[], Again]) -> Iterator[Again]:
    """A run, and as long as its attribute `again` is set when it comes back, another one made for what is left."""
    environment = dict(os.environ)
    run = make()
    yield run
    try:
        while run.again:  # type: ignore[attr-defined]
            os.environ.clear()  # of the ranks that Lightning started, which would start none any more
            os.environ.update(environment, **{_AGAIN: "1"})
            run = make()
            yield run
    finally:
        os.environ.pop(_AGAIN, None)


def is_another_attempt() -> bool:
    """Whether this run goes on in its own directory, whatever it was told to begin with."""
    return _AGAIN in os.environ


def free_memory() -> None:
    """Of the attempt before, whose objects refer to one another."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def decided(directory: Path, saved: dict[str, Any] | None) -> Decision:
    """What was decided for the batch of a run."""
    return plan_of(directory, saved).get(NAME) or {}


def plan_of(directory: Path, saved: dict[str, Any] | None) -> dict[str, Any]:
    """All that was decided for a run: by plan.json in its directory, else by the plan *saved* in its checkpoint."""
    return {**(saved or {}), **_plan(directory)}


def follow(decision: Decision, config: dict[str, Any]) -> bool:
    """Put the decided values into a configuration; False, and nothing is changed, where it was another one."""
    if not decision or any(value_of(config, key) != values["was"] for key, values in decision.items()):
        return False
    for key, values in decision.items():
        _set(config, key, values["is"])
    log.info("as decided on this run's machine: %s", shown(decision))
    return True


def to_start_again(
    error: Exception, trainer: pl.Trainer, data: SystemData, config: dict[str, Any], decision: Decision, directory: Path
) -> bool:
    """Whether the run is to be started again in this process, with a new decision in plan.json.

    Raises SystemExit in a process that Lightning has started beside the first one: that starts a new one.
    """
    watcher = next((c for c in trainer.callbacks if isinstance(c, OutOfMemory)), None)  # type: ignore[attr-defined]
    if watcher is None or not watcher.halve_batch:
        return False
    if is_out_of_memory(error) and watcher.stage is not None:
        new = _halved(watcher.stage, data, config, decision)
        if new is None:
            log.warning("the batch is a single example already")
            return False
        write(directory, {NAME: new})
        if ranks.started_by_lightning():
            raise SystemExit(1) from error
    elif ranks.num_children() and ranks.is_consequence(error) and ranks.failure(wait_s=5) is not None:
        new = decided(directory, None)  # by the one that failed
    else:
        return False
    if new in ({}, decision):
        return False
    log.warning("going on with %s", shown(new))
    if trainer.world_size != 1 + ranks.num_children():
        return False
    ranks.kill()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return True


def _halved(stage: str, data: SystemData, config: dict[str, Any], decision: Decision) -> Decision | None:
    """The decision after another halving; None: there is nothing to halve."""
    size = data.batch_sizes[stage]
    if size == 1:
        return None
    half, parts = divided(size)
    values: dict[str, Any] = {data.batch_size_key(stage): half if stage == "train" else size // 2}
    if stage == "train":
        values["trainer.accumulate_grad_batches"] = value_of(config, "trainer.accumulate_grad_batches") * parts
        counted = {key: value_of(config, key) for key in PER_BATCH}
        values |= {key: value * parts for key, value in counted.items() if type(value) is int}
    was = {key: entry["was"] for key, entry in decision.items()}
    new = {key: {"was": was.get(key, value_of(config, key)), "is": value} for key, value in values.items()}
    return {**decision, **new}


def write(directory: Path, decisions: dict[str, Any]) -> None:
    """Add decisions to plan.json."""
    path = directory / "plan.json"
    beside = path.with_name(f"plan.json.{os.getpid()}.tmp")  # several processes may have run out
    try:
        beside.write_text(json.dumps({**_plan(directory), **decisions}, indent=2, sort_keys=True) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _plan(directory: Path) -> dict[str, Any]:
    path = directory / "plan.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            plan = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON any more ({error}); remove it") from error
        return plan if isinstance(plan, dict) else {}
    return {}


def value_of(config: dict[str, Any], key: str) -> Any:
    """Of a configuration, by dotted key; None where there is none."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """In the section that the key names; NEST's data section has a copy of its model's."""
    section, *inner, name = key.split(".")
    for top in {section, "data"} if inner else {section}:
        node = config[top]
        for part in inner:
            node = node[part]
        node[name] = value


def shown(decision: Decision) -> str:
    """As it would be typed."""
    return " ".join(f"{key}={values['is']}" for key, values in decision.items())
