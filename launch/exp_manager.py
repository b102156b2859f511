"""The switches of the exp_manager section, turned into the sections that they switch.

Where a run lives is launch/run_dir.py; the values of `checkpoint_callback_params` reach callbacks.checkpoint through
the configuration itself.
"""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from callbacks.ema import EMA
from launch.command_line import CONFIG_DIR, keys
from launch.errors import ConfigError
from models.base import System

_PARAMS = "exp_manager.checkpoint_callback_params"
_FREE = "exp_manager.wandb_logger_kwargs."  # whatever Lightning's WandbLogger takes


def check_sections(cfg: DictConfig) -> None:
    """Raises ConfigError with a line for each section that is given as something else; other sections refer to them."""
    lines = []
    for key in sorted({key.rpartition(".")[0] for key in keys(_known())} - {""}):
        value = OmegaConf.select(cfg, key)
        optional = key == _FREE.rstrip(".") and value is None
        if not isinstance(value, DictConfig) and not optional:
            lines.append(f"{key} must be a section of keys with values, got {value!r}")
    if lines:
        raise ConfigError("\n".join(lines))


def problems(config: dict[str, Any], system: type[System] | None) -> list[str]:
    """A line for each key that cannot be used: one that is none of ours, as NeMo's configurations may have, or
    archives of a system that has none."""
    lines = _unknown_keys(config)
    if (chosen := config["exp_manager"]["on_full_disk"]) not in ("stop", "continue"):
        lines.append(f"exp_manager.on_full_disk={chosen}: choose stop or continue")
    if _saves_archives(config) and system is not None and not hasattr(system, "save_to"):
        lines.append(f"{_PARAMS}.always_save_nemo=true: {system.__name__} cannot be written as a .nemo archive")
    return lines


def archive_writer(config: dict[str, Any], system: System) -> Callable[[Path], None] | None:
    """What writes a `.nemo` archive beside each of the best checkpoints; None: nothing does."""
    return partial(_save_archive, system) if _saves_archives(config) else None


def _save_archive(system: System, path: Path) -> None:
    """Of the weights that the checkpoint beside it holds."""
    averages = [callback for callback in system.trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    with averages[0].weights_in(system) if averages else nullcontext():
        system.save_to(path)  # type: ignore[operator]


def _saves_archives(config: dict[str, Any]) -> bool:
    return config["exp_manager"]["checkpoint_callback_params"]["always_save_nemo"]


def _known() -> DictConfig:
    """The section with all its keys."""
    return OmegaConf.create({"exp_manager": OmegaConf.load(CONFIG_DIR / "exp_manager" / "default.yaml")})


def _unknown_keys(config: dict[str, Any]) -> list[str]:
    have = set(keys(_known()))
    given = keys(OmegaConf.create({"exp_manager": config["exp_manager"]}))
    return [
        f"{key}: no such key here, there are {', '.join(_siblings(key, have))}; take it out"
        for key in given
        if key not in have and not key.startswith(_FREE) and key.rpartition(".")[0] in have
    ]


def _siblings(key: str, have: set[str]) -> list[str]:
    parent = key.rpartition(".")[0] + "."
    names = (other.removeprefix(parent) for other in have if other.startswith(parent))
    return sorted(name for name in names if "." not in name)


def switch(config: dict[str, Any], directory: str) -> None:
    """Add and take out loggers and checkpoint callbacks. Raises ConfigError where a package is missing."""
    section = config["exp_manager"]
    if not section["create_tensorboard_logger"]:
        config["logger"] = {**(config["logger"] or {}), "tensorboard": None}
    if section["create_wandb_logger"]:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("exp_manager.create_wandb_logger=true: the package is not installed: pip install wandb")
        given = {key: value for key, value in (section["wandb_logger_kwargs"] or {}).items() if value is not None}
        wandb = {"_target_": "pytorch_lightning.loggers.WandbLogger", "save_dir": directory, "name": section["name"]}
        config["logger"] = {**(config["logger"] or {}), "wandb": wandb | given}
    if not section["create_checkpoint_callback"]:
        config["callbacks"] = {**(config["callbacks"] or {}), "checkpoint": None, "last": None}


def monitor_training_loss(cfg: DictConfig) -> None:
    """Without validation, what is best is decided by the training loss."""
    cfg.monitor = {"metric": "train_loss", "mode": "min"}
    params = cfg.exp_manager.checkpoint_callback_params
    if str(params.monitor).startswith("val_"):  # named in a configuration of one's own, not through cfg.monitor
        params.monitor, params.mode = "train_loss", "min"
