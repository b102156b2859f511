"""The values of the trainer section: each of its kind before anything is built, the rest refused in one line."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks.ddp import DDP_NAMES
from launch.errors import ConfigError
from launch.hardware import launched

# key -> least value, whether it may be null
_WHOLE = {
    "num_nodes": (1, False),
    "max_epochs": (-1, True),
    "max_steps": (-1, False),
    "min_epochs": (0, True),
    "min_steps": (0, True),
    "accumulate_grad_batches": (1, False),
    "check_val_every_n_epoch": (1, True),
    "num_sanity_val_steps": (-1, True),
    "log_every_n_steps": (0, True),
}
_NUMBERS = {
    "gradient_clip_val": (0, True),
    "limit_train_batches": (0, True),
    "limit_val_batches": (0, True),
    "limit_test_batches": (0, True),
    "overfit_batches": (0, False),
}
_FSDP, _UNUSED = "fsdp", "_find_unused_parameters_true"
_SWITCHES = ("enable_progress_bar", "enable_model_summary", "detect_anomaly", "inference_mode")


def wrong_values(section: dict[str, Any]) -> list[str]:
    """A line for each value that is not of the kind that its key takes."""
    lines = []
    for table, kind in ((_WHOLE, "whole number"), (_NUMBERS, "number")):
        for key, (least, optional) in table.items():
            value = section.get(key, least)
            fits = _is_number(value, whole=table is _WHOLE) and value >= least
            if not (fits or (optional and value is None)):
                lines.append(_line(section, key, f"a {kind} of at least {least}{' or null' if optional else ''}"))
    lines += [_line(section, k, "true or false") for k in _SWITCHES if not isinstance(section.get(k, True), bool)]
    every = section.get("val_check_interval", 1)
    batches = _is_number(every, whole=True) and every >= 1
    if not (batches or isinstance(every, str | dict | None) or (_is_number(every) and 0 < every < 1)):
        lines.append(_line(section, "val_check_interval", "a number of batches, a fraction of an epoch or null"))
    if not isinstance(section.get("max_time"), str | dict | None):
        lines.append(_line(section, "max_time", 'a time as "DD:HH:MM:SS" or null'))
    if not _are_devices(section.get("devices")):
        lines.append(_line(section, "devices", "a number of at least 1, a list of GPUs, -1 or auto"))
    return lines


def _line(section: dict[str, Any], key: str, needed: str) -> str:
    value = "null" if section[key] is None else section[key]
    return f"trainer.{key}={value}: give {needed}"


def _is_number(value: Any, whole: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (not whole or float(value).is_integer())


def _are_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(index, int) and index >= 0 for index in value)
    if isinstance(value, str):
        return value in ("auto", "-1") or (value.isdigit() and int(value) > 0)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1))


def wrong_strategy(section: dict[str, Any]) -> list[str]:
    """Lines about a `strategy` that is none, or that this machine or launcher cannot carry out.

    *section*: with accelerator and devices as they are.
    """
    name, line = section.get("strategy"), None
    if name in (None, "auto"):
        return []
    if name not in (*DDP_NAMES, _FSDP):
        line = f"choose from auto, ddp, ddp_spawn, ddp_fork (also with {_UNUSED} behind it) and {_FSDP}"
    elif name == _FSDP and section["accelerator"] != "cuda":
        line = "it needs CUDA GPUs; use trainer.strategy=ddp"
    elif name == _FSDP and section.get("gradient_clip_val") and section.get("gradient_clip_algorithm") != "value":
        line = "it cannot clip gradients by their norm; use ddp, or trainer.gradient_clip_val=null"
    elif name.startswith("ddp_fork") and section["accelerator"] == "cuda":
        line = "CUDA does not work in a process that was forked; use ddp"
    elif name.startswith(("ddp_spawn", "ddp_fork")) and (outside := launched()):
        line = f"{outside.by} has started the processes; use ddp"
    return [f"trainer.strategy={name}: {line}"] if line else []


def refused_strategies(section: dict[str, Any], callbacks: dict[str, type | None]) -> list[str]:
    """A line for each callback that cannot work with the strategy: its class says so, and why.

    `refuses_strategy`: the first word of strategies' names (`ddp_spawn`, `fsdp`) -> the reason.
    """
    strategy = str(section.get("strategy"))
    return [
        f"callbacks.{name} does not work with trainer.strategy={strategy}: {reason}; use ddp, or callbacks.{name}=null"
        for name, cls in callbacks.items()
        for family, reason in getattr(cls, "refuses_strategy", {}).items()
        if strategy == family or strategy.startswith(f"{family}_find_")
    ]


def make_trainer(section: dict[str, Any], **supplied: Any) -> pl.Trainer:
    """The Trainer of a section and of what launch supplies. Raises ConfigError for what it refuses."""
    try:
        return pl.Trainer(**section, **supplied)
    except (ValueError, TypeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"trainer: {reason}") from error
