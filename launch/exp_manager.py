"""The switches of the exp_manager section, NeMo's by name and meaning, turned into the sections that they switch.

Where a run lives is launch/run_dir.py; the values of `checkpoint_callback_params` reach callbacks.checkpoint through
the configuration itself. What NeMo has and this has not may stand there as long as it asks for nothing.
"""

import importlib.util
import inspect
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger

from callbacks.ema import EMA
from callbacks.graceful import duration_s
from launch.command_line import CONFIG_DIR, keys
from launch.errors import ConfigError
from launch.report import relative
from models.base import System
from models.checkpoint import load

log = logging.getLogger(__name__)

_SECTION = "exp_manager."
_PARAMS = f"{_SECTION}checkpoint_callback_params"
_EARLY = f"{_SECTION}early_stopping_callback_params"
# Whatever Lightning's loggers take.
_FREE = (f"{_SECTION}wandb_logger_kwargs", f"{_SECTION}summary_writer_kwargs")
_ARCHIVES = ("always_save_nemo", "save_nemo_on_train_end")
# Of NeMo alone: the values that ask for nothing, or for what is done here anyway; and what to do instead.
_ASK_FOR_NOTHING: dict[str, tuple[tuple[Any, ...], str]] = {
    **{f"create_{name}_logger": ((False, None), "") for name in ("mlflow", "dllogger", "clearml", "neptune")},
    "create_ipl_epoch_stopper_callback": ((False, None), ""),
    "create_straggler_detection_callback": ((False, None), ""),
    "create_fault_tolerance_callback": ((False, None), ""),
    "log_delta_step_timing": ((False, None), "callbacks.progress.every_n_steps=1 writes a line for each step"),
    "log_local_rank_0_only": ((False, None), ""),
    "log_global_rank_0_only": ((False, None), ""),
    "log_tflops_per_sec_per_gpu": ((True, False, None), ""),
    "disable_validation_on_resume": ((True, None), "a resumed run goes on exactly where it was"),
    "ema.cpu_offload": ((False, None), ""),
    "step_timing_kwargs.reduction": (("mean", None), ""),
    "checkpoint_callback_params.filepath": ((None,), "exp_manager.explicit_log_dir says where a run lives"),
    "checkpoint_callback_params.dirpath": ((None,), "exp_manager.explicit_log_dir says where a run lives"),
    "checkpoint_callback_params.prefix": ((None,), "it is part of filename"),
    "checkpoint_callback_params.postfix": ((".nemo", None), ""),
    "checkpoint_callback_params.train_time_interval": ((None,), "use every_n_train_steps"),
    "checkpoint_callback_params.model_parallel_size": ((None, 1), ""),
    "checkpoint_callback_params.async_save": ((False, None), ""),
    "checkpoint_callback_params.save_last_n_optim_states": ((-1, None), ""),
}
# Of NeMo alone, and of no say where the above is so.
_IGNORED = (
    "seconds_to_sleep",
    "fault_tolerance",
    "straggler_detection_params",
    "ipl_epoch_stopper_callback_params",
    *(f"{name}_logger_kwargs" for name in ("mlflow", "dllogger", "clearml", "neptune")),
)


# What must be true or false.
_SWITCHES = (
    *("use_datetime_version", "resume_if_exists", "resume_ignore_no_checkpoint", "resume_past_end"),
    *(f"create_{name}" for name in ("tensorboard_logger", "wandb_logger", "checkpoint_callback")),
    *("create_early_stopping_callback", "create_preemption_callback", "log_step_timing"),
    *(f"checkpoint_callback_params.{name}" for name in (*_ARCHIVES, "save_best_model")),
    *(f"checkpoint_callback_params.save_{name}" for name in ("last", "weights_only")),
    *("ema.enable", "ema.validate_original_weights"),
)
_OR_NULL = ("create_early_stopping_callback",)


def check_sections(cfg: DictConfig) -> None:
    """Raises ConfigError with a line for each section that is given as something else; other sections refer to them."""
    lines = []
    for key in sorted({key.rpartition(".")[0] for key in keys(_known())} - {""} | set(_FREE)):
        value = OmegaConf.select(cfg, key)
        optional = key in _FREE and value is None
        if not isinstance(value, DictConfig) and not optional:
            lines.append(f"{key} must be a section of keys with values, got {value!r}")
    if lines:
        raise ConfigError("\n".join(lines))


def problems(config: dict[str, Any], system: type[System] | None) -> list[str]:
    """A line for each key that cannot be used: one that is none of ours, as NeMo's configurations may have, wrong
    values, or archives of a system that has none."""
    section = config["exp_manager"]
    lines = _unknown_keys(section)
    if (chosen := section["on_full_disk"]) not in ("stop", "continue"):
        lines.append(f"exp_manager.on_full_disk={chosen}: choose stop or continue")
    for key in _ARCHIVES:
        if section["checkpoint_callback_params"][key] and system is not None and not hasattr(system, "save_to"):
            lines.append(f"{_PARAMS}.{key}=true: {system.__name__} cannot be written as a .nemo archive")
    return lines + _wrong_values(section, config)


def _wrong_values(section: dict[str, Any], config: dict[str, Any]) -> list[str]:
    lines = [
        f"{_SECTION}{key} must be true or false{', or null' if key in _OR_NULL else ''}, got {value!r}"
        for key, value in {name: _select(section, name) for name in _SWITCHES}.items()
        if not isinstance(value, bool) and not (value is None and key in _OR_NULL)
    ]
    if (limit := section["max_time_per_run"]) is not None:
        try:
            duration_s(limit)
        except ValueError as error:
            lines.append(f"{_SECTION}max_time_per_run: {error}")
        if not (config["callbacks"] or {}).get("graceful"):
            lines.append(f"{_SECTION}max_time_per_run={limit}: needs callbacks.graceful, which is switched off")
    if section["checkpoint_callback_params"]["save_weights_only"] and (config["callbacks"] or {}).get("ema"):
        lines.append(f"{_PARAMS}.save_weights_only=true: callbacks.ema keeps its average in whole checkpoints only")
    for key in section["summary_writer_kwargs"] or {}:
        if key not in _of_the_writer():
            lines.append(f"{_FREE[1]}.{key}: no such argument; there are {', '.join(sorted(_of_the_writer()))}")
    if config["ckpt_path"] and section["resume_from_checkpoint"]:
        lines.append(f"ckpt_path and {_SECTION}resume_from_checkpoint: give one of them")
    files = _files(section)
    lines += [f"{_SECTION}files_to_copy: {file}: no such file" for file in files if not file.is_file()]
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    lines += [f"{_SECTION}files_to_copy: two files are called {name}" for name in twice]
    return lines


def _of_the_writer() -> set[str]:
    from torch.utils.tensorboard import SummaryWriter  # takes a second, which only those pay who need it

    names = {*inspect.signature(TensorBoardLogger).parameters, *inspect.signature(SummaryWriter).parameters}
    return names - {"save_dir", "name", "version", "log_dir", "kwargs"}


def _files(section: dict[str, Any]) -> list[Path]:
    named = section["files_to_copy"] or []
    return [Path(str(file)) for file in ([named] if isinstance(named, str) else named)]


def copy_files(config: dict[str, Any], directory: Path) -> None:
    """Put `files_to_copy` into the run directory."""
    for file in _files(config["exp_manager"]):
        shutil.copy(file, directory)


def archive_writer(config: dict[str, Any], system: System) -> Callable[[Path], None] | None:
    """What writes a `.nemo` archive beside each of the best checkpoints; None: nothing does."""
    saves = config["exp_manager"]["checkpoint_callback_params"]["always_save_nemo"]
    return partial(_save_archive, system) if saves else None


def _save_archive(system: System, path: Path) -> None:
    """Of the weights that the checkpoint beside it holds."""
    averages = [callback for callback in system.trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    with averages[0].weights_in(system) if averages else nullcontext():
        system.save_to(path)  # type: ignore[operator]


def save_archive_at_end(config: dict[str, Any], trainer: pl.Trainer, system: System, directory: Path) -> None:
    """`checkpoints/<name>.nemo` of a complete training: its last weights, or with `save_best_model` its best."""
    section = config["exp_manager"]
    params = section["checkpoint_callback_params"]
    if not params["save_nemo_on_train_end"] or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return
    path = directory / "checkpoints" / f"{Path(section['name'] or 'default').name}.nemo"
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    try:
        if params["save_best_model"] and best:
            load(best, packages=config["packages"]).save_to(path)  # type: ignore[operator]
        else:
            _save_archive(system, path)
    except OSError as error:  # the checkpoints are there, and hold all that the archive would
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        log.warning("%s could not be written (%s)", path, error.strerror or error)
    else:
        log.info("archive          %s", relative(path))


def _known() -> DictConfig:
    """The section with all its keys."""
    return OmegaConf.create({"exp_manager": OmegaConf.load(CONFIG_DIR / "exp_manager" / "default.yaml")})


def _unknown_keys(section: dict[str, Any]) -> list[str]:
    have = set(keys(_known()))
    lines = []
    for key in keys(OmegaConf.create({"exp_manager": section})):
        name = key.removeprefix(_SECTION)
        parent = key.rpartition(".")[0]
        if key in have or parent in _FREE or parent not in have or name in _IGNORED:
            continue
        nothing, instead = _ASK_FOR_NOTHING.get(name, ((), ""))
        value = _select(section, name)
        if name not in _ASK_FOR_NOTHING:
            lines.append(f"{key}: no such key here, there are {', '.join(_siblings(key, have))}; take it out")
        elif value not in nothing:
            lines.append(f"{key}={value}: not supported{instead and f'; {instead}'}")
    return lines


def _select(section: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        section = section[part]
    return section


def _siblings(key: str, have: set[str]) -> list[str]:
    parent = key.rpartition(".")[0] + "."
    names = (other.removeprefix(parent) for other in have if other.startswith(parent))
    return sorted(name for name in names if "." not in name)


def switch(config: dict[str, Any], directory: str) -> None:
    """Add and take out loggers and callbacks. Raises ConfigError for a missing package, or sections that disagree."""
    section = config["exp_manager"]
    _switch_loggers(config, section, directory)
    callbacks: dict[str, Any] = {}
    if not section["create_checkpoint_callback"]:
        callbacks |= {"checkpoint": None, "last": None}
    if not section["checkpoint_callback_params"]["save_last"]:
        callbacks["last"] = None
    if not section["create_preemption_callback"]:
        callbacks["graceful"] = None
    if (stops_early := section["create_early_stopping_callback"]) is not None:
        stopping = {"_target_": "callbacks.early_stopping.EarlyStopping", **section["early_stopping_callback_params"]}
        callbacks["early_stopping"] = stopping if stops_early else None
    if section["log_step_timing"]:
        callbacks["step_timing"] = {"_target_": "callbacks.step_timing.StepTiming", **_timing(section)}
    if (ema := section["ema"])["enable"]:
        if (config["callbacks"] or {}).get("ema"):
            raise ConfigError("exp_manager.ema.enable=true and callbacks=[…,ema]: choose one of them")
        average = {"decay": ema["decay"], "every_n_steps": ema["every_n_steps"], "warmup": False}
        average["validate"] = not ema["validate_original_weights"]
        callbacks["ema"] = {"_target_": "callbacks.ema.EMA", **average}
    if callbacks:
        config["callbacks"] = {**(config["callbacks"] or {}), **callbacks}


def _timing(section: dict[str, Any]) -> dict[str, Any]:
    return {key: section["step_timing_kwargs"][key] for key in ("buffer_size", "sync_cuda")}


def _switch_loggers(config: dict[str, Any], section: dict[str, Any], directory: str) -> None:
    loggers = dict(config["logger"] or {})
    if not section["create_tensorboard_logger"]:
        loggers["tensorboard"] = None
    elif section["summary_writer_kwargs"] and loggers.get("tensorboard"):
        loggers["tensorboard"] = loggers["tensorboard"] | section["summary_writer_kwargs"]
    if section["create_wandb_logger"]:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("exp_manager.create_wandb_logger=true: the package is not installed: pip install wandb")
        given = {key: value for key, value in (section["wandb_logger_kwargs"] or {}).items() if value is not None}
        wandb = {"_target_": "pytorch_lightning.loggers.WandbLogger", "save_dir": directory, "name": section["name"]}
        loggers["wandb"] = wandb | given
    if loggers:
        config["logger"] = loggers


def monitor_training_loss(cfg: DictConfig) -> None:
    """Without validation, what is best is decided by the training loss."""
    cfg.monitor = {"metric": "train_loss", "mode": "min"}
    for key in (_PARAMS, _EARLY):
        params = OmegaConf.select(cfg, key)
        if params is not None and str(params.monitor).startswith("val_"):  # named in a configuration of one's own
            params.monitor, params.mode = "train_loss", "min"
