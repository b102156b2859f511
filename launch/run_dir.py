"""Where a run lives: <exp_dir>/<name>/<version or start time>, one directory for all ranks; or explicit_log_dir.

In NeMo's layout a run that may be continued lives in <exp_dir>/<name> itself.

The start time is taken once, by the first process, and handed to its children through RUN_STAMP; launchers of many
machines give all ranks the same stamp through SLURM_JOB_ID or torchrun's --rdzv_id.
"""

import json
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from launch.errors import ConfigError

_STAMP_FORMAT = "%Y%m%d-%H%M%S"
LAST = Path("checkpoints") / "last.ckpt"
_BEFORE_THE_FIRST_STEP = ("command.sh", "environment.txt", "hparams.yaml", "plan.json", "summary.json", "events.out.*")
_EXP_DIR = {"ours": "runs", "nemo": "nemo_experiments"}  # where exp_dir is null


def register_resolvers() -> None:
    """Make `${run_dir:…}`, `${sweep_dir:…}` and `${console_level:}` known to the configuration."""
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True)
    OmegaConf.register_new_resolver("console_level", lambda: "INFO" if rank() == 0 else "WARNING", replace=True)
    OmegaConf.register_new_resolver("log_name", log_name, replace=True)
    OmegaConf.register_new_resolver("record_dir", lambda: ".hydra" if rank() == 0 else None, replace=True)


def rank() -> int:
    """Of this process, as its launcher tells it; 0 when there is none."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def restarts() -> int:
    """How often its launcher has started this run anew: torchrun after a failure, SLURM after a requeue."""
    counts = [os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return sum(int(count) for count in counts if count.isdigit())


def log_name(job_name: str) -> str:
    """The log file of this rank: <job>.log for rank 0; Lightning names the jobs of its children itself."""
    return f"{job_name}_rank{rank()}.log" if rank() and "_ddp_process_" not in job_name else f"{job_name}.log"


def run_dir(exp_manager: Any, layout: str = "ours") -> str:
    """The directory of a run; with `resume_if_exists`, that of the run to continue when there is one.

    *layout* `nemo`: `exp_dir` null is another folder, and a run that may be continued has no stamp.
    """
    base = _base(exp_manager, layout)
    if exp_manager.explicit_log_dir:
        return str(base)
    if exp_manager.resume_if_exists and (found := find_run(exp_manager, layout)) is not None:
        return str(found)
    if exp_manager.resume_if_exists and layout == "nemo":
        return str(base / str(exp_manager.version or ""))
    return str(base / _version(exp_manager, base))


def _version(exp_manager: Any, base: Path) -> str:
    """The name of a new run's folder."""
    return str(exp_manager.version or _stamp(base, numbered=not exp_manager.use_datetime_version))


def sweep_dir(exp_manager: Any, layout: str = "ours") -> str:
    """The directory of a sweep; each job has a numbered one inside."""
    base = _base(exp_manager, layout)
    return str(base / f"sweep-{_version(exp_manager, base)}")


def find_run(exp_manager: Any, layout: str = "ours") -> Path | None:
    """`version` if given, else the newest directory of this name (itself included) that holds a checkpoint."""
    base = _base(exp_manager, layout)
    inner = [] if exp_manager.explicit_log_dir else sorted(base.glob("*"))
    only = exp_manager.version and not exp_manager.explicit_log_dir
    candidates = [base / str(exp_manager.version)] if only else [base, *inner]
    holding = [folder for folder in candidates if any(folder.glob("checkpoints/*.ckpt"))]
    return max(holding, key=_last_saved, default=None)


def newest_run(folder: Path) -> Path | None:
    """The directory below *folder* (itself included) whose checkpoints are the newest."""
    holding = {file.parent.parent for file in folder.rglob("checkpoints/*.ckpt")}
    return max(holding, key=_last_saved, default=None)


def discard_if_unused(folder: Path, *, refused: bool = False) -> None:
    """Remove the directory of a run that never began: it holds nothing but Hydra's own record.

    *refused*: it ended with a user's mistake; then what is written before the first step counts as nothing too.
    """
    if rank() != 0 or not (folder / ".hydra").is_dir():
        return
    unused = (".hydra", "*.log", *(_BEFORE_THE_FIRST_STEP if refused and not _steps(folder) else ()))
    if all(any(item.match(pattern) for pattern in unused) for item in folder.iterdir()):
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, logging.FileHandler):  # would make the file anew with its next line
                logging.getLogger().removeHandler(handler)
                handler.close()
        shutil.rmtree(folder)
        for parent in list(folder.parents)[:3]:  # the sweep's directory, which its next job makes anew; <name>; runs
            ours = not (Path.cwd().is_relative_to(parent) or parent.is_mount())
            if not ours or any(item.name != "multirun.yaml" for item in parent.iterdir()):
                break
            shutil.rmtree(parent)


def _steps(folder: Path) -> int:
    """That the run in a directory has made, as far as it says."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return int(json.loads((folder / "summary.json").read_text())["steps"])
    return 0


def _last_saved(folder: Path) -> float:
    return max(file.stat().st_mtime for file in folder.glob("checkpoints/*.ckpt"))


def _base(exp_manager: Any, layout: str) -> Path:
    if not isinstance(exp_manager, DictConfig):
        raise ConfigError(f"exp_manager={exp_manager}: must be a section of keys with values")
    if exp_manager.explicit_log_dir:
        return _free_of_files(Path(str(exp_manager.explicit_log_dir)), "explicit_log_dir", exp_manager)
    name = str(exp_manager.name or "default")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"exp_manager.name={name}: give a plain folder name; exp_manager.exp_dir says where")
    return _free_of_files(Path(exp_manager.exp_dir or _EXP_DIR[layout]) / name, "exp_dir", exp_manager)


def _free_of_files(folder: Path, key: str, exp_manager: Any) -> Path:
    if file := next((part for part in (folder, *folder.parents) if part.is_file()), None):
        raise ConfigError(f"exp_manager.{key}={exp_manager[key]}: {file} is a file, not a folder")
    return folder


def _stamp(base: Path, *, numbered: bool) -> str:
    if "RUN_STAMP" not in os.environ:
        os.environ["RUN_STAMP"] = _launcher_stamp() or (_next_number(base) if numbered else _clock_stamp(base))
    return os.environ["RUN_STAMP"]


def _launcher_stamp() -> str | None:
    """What all ranks of an outside launcher have in common; None without one."""
    if "SLURM_JOB_ID" in os.environ:
        return os.environ["SLURM_JOB_ID"]
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic != "none":
        return elastic
    # torchrun without --rdzv_id: the ranks of one machine have one parent. Several machines need the id.
    return time.strftime(_STAMP_FORMAT, time.localtime(psutil.Process(os.getppid()).create_time()))


def _clock_stamp(base: Path) -> str:
    """The time of day; two runs that are started by hand within one second are still two."""
    stamp = name = time.strftime(_STAMP_FORMAT)
    taken = 1
    while (base / name).exists():
        taken += 1
        name = f"{stamp}-{taken}"
    return name


def _next_number(base: Path) -> str:
    taken = [item.name.rpartition("_")[2] for item in base.glob("version_*")]
    return f"version_{max((int(number) for number in taken if number.isdigit()), default=-1) + 1}"
