"""What this machine has: accelerator and device count, cores for each process, and quiet libraries."""

import ctypes
import logging
import os
import platform
import warnings
from typing import Any, NamedTuple

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from launch.errors import ConfigError
from launch.run_dir import restarts

log = logging.getLogger(__name__)


_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


class Launched(NamedTuple):
    """What a launcher other than Lightning has started."""

    by: str
    processes: int  # on each machine
    nodes: int  # machines


def launched() -> Launched | None:
    """By torchrun or srun; None: this process was started alone, or by Lightning."""
    if (here := os.environ.get("LOCAL_WORLD_SIZE", "")).isdigit():
        return Launched("torchrun", int(here), int(os.environ.get("WORLD_SIZE", here)) // int(here))
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return Launched("srun", int(os.environ["SLURM_NTASKS"]) // nodes, nodes)
    return None


def resolve_hardware(trainer: dict[str, Any]) -> dict[str, Any]:
    """The trainer section with `accelerator`, `devices` and `num_nodes` as this machine and the launcher have them.

    `devices` auto is all GPUs, or one process on a CPU; -1 is all there are. Under torchrun and srun both are as many
    processes as these have started, and `num_nodes` 1 is as many machines. Raises ConfigError for an accelerator that
    is not there, and for numbers that the launcher contradicts.
    """
    resolved = dict(trainer)
    wanted, devices = str(trainer["accelerator"]), trainer["devices"]
    if wanted not in _ACCELERATORS:
        raise ConfigError(f"trainer.accelerator={wanted}: choose from {', '.join(_ACCELERATORS)}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    outside = launched()
    if wanted in ("gpu", "cuda") and not gpus:
        if wanted == "gpu" and torch.backends.mps.is_available():
            wanted = "mps"
        else:
            raise ConfigError(
                f"trainer.accelerator={wanted}: no GPU is visible here; use trainer.accelerator=cpu or auto"
            )
    if wanted in ("auto", "gpu"):
        wanted = "cuda" if gpus else "cpu"
    resolved["accelerator"] = wanted
    if devices in ("auto", -1, "-1", None):
        count = outside.processes if outside else (gpus if wanted == "cuda" else 1)
        if devices not in ("auto", None):
            log.info("trainer.devices=-1: %d %s", count, "GPU(s)" if wanted == "cuda" else f"process on {wanted}")
        resolved["devices"] = devices = count
    if wanted == "cuda" and isinstance(devices, int) and devices > gpus:
        raise ConfigError(f"trainer.devices={devices}: {gpus} GPU(s) visible here")
    if outside is not None:
        if resolved["num_nodes"] == 1:
            resolved["num_nodes"] = outside.nodes
        if (num_processes(resolved), resolved["num_nodes"]) != outside[1:]:
            raise ConfigError(
                f"trainer.devices={trainer['devices']} trainer.num_nodes={trainer['num_nodes']}: {outside.by} has"
                f" started {outside.processes} process(es) on each of {outside.nodes} machine(s); leave both out"
            )
    if wanted == "cpu" and isinstance(devices, list):
        raise ConfigError(f"trainer.devices={devices}: a list names GPUs; on a CPU give the number of processes")
    if wanted == "cpu" and trainer.get("sync_batchnorm"):
        log.info("trainer.sync_batchnorm is dropped: it needs GPUs")
        resolved["sync_batchnorm"] = False
    return resolved


def restart_problems(resumes: bool) -> list[str]:
    """A line where torchrun starts a run anew on several machines, and not all of them would go on with it.

    *resumes*: whether the run is one that resumes in any case.
    """
    outside = launched()
    if not restarts() or outside is None or outside.by != "torchrun" or outside.nodes == 1:
        return []
    if resumes and not _shares_store():
        return []
    return [
        "torchrun has started this run anew on several machines, of which only the one that failed is told so: give"
        " exp_manager.resume_if_exists=true, and torchrun TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/clusters.md)"
    ]


def join(trainer: dict[str, Any], job: int = 0) -> None:
    """Begin the process group of a run that torchrun has started anew, or of another *job* of its sweep.

    torchrun's store still holds what was there before, and a process may read where another one was to be found then
    (pytorch issues 135712 and 167288). So this group has a part of the store of its own.
    """
    if (restarts() or job) and _shares_store():
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        torch.distributed.init_process_group(
            "nccl" if trainer["accelerator"] == "cuda" else "gloo",
            store=torch.distributed.PrefixStore(f"attempt {restarts()}, job {job}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def _shares_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def torch_device(name: str) -> torch.device:
    """The device that `device=` names: auto (the GPU when there is one), cpu, cuda, cuda:1 …

    Raises ConfigError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device={name}: no such device here; use auto, cpu, cuda") from None
    return device


def num_processes(trainer: dict[str, Any]) -> int:
    """Processes of this run on this machine."""
    devices = trainer["devices"]
    return len(devices) if isinstance(devices, list) else int(devices)


def keep_freed_memory(trainer: dict[str, Any]) -> None:
    """On a CPU, let glibc keep what large tensors free for the next step.

    By default it hands each of them back to the kernel and takes page faults for the next one, which costs up to a
    quarter of the CPU time of a training step (docs/RESULTS.md). Other C libraries have no such call and are left
    alone.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if trainer["accelerator"] == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def share_cores(trainer: dict[str, Any], cpu_threads: int | None) -> None:
    """Threads of this process on a CPU: *cpu_threads*, or the cores divided among the run's processes.

    A small network is trained with least CPU time by one thread (docs/RESULTS.md): more wait for one another in every
    operation, and waiting costs CPU time too, several times the training's own when other work is on the cores.
    """
    if trainer["accelerator"] != "cpu":
        return
    if cpu_threads is not None:
        if type(cpu_threads) is not int or cpu_threads < 1:
            raise ConfigError(f"cpu_threads={cpu_threads}: give a whole number of at least 1, or null")
        torch.set_num_threads(cpu_threads)
    elif (processes := num_processes(trainer)) > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


# Messages of libraries that are right in general and wrong or without consequence here; each with its reason.
_KNOWN_NOISE = (
    ".*`self.log\\('train_loss', ..., sync_dist=True\\)`.*",  # models/base.py reduces it where it is compared
    ".*does not have many workers.*",  # data/loader.py chooses them for the machine
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",  # Lightning against this torch; nothing to do for a user
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run continues in its own directory
    ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our samplers know their position
    ".*The dirpath has changed from.*",  # continuing a checkpoint in a new run, as the first line says
    ".*could not find the monitored key.*",  # training ended before the first validation
    ".*smaller than the logging interval.*",  # a short epoch; nothing is lost
    ".*not available but strict is set to.*",  # an epoch that ended before the first validation
    ".*Trying to infer the `batch_size`.*",  # given to every log call that needs it
    ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",  # raised falsely after a resume
)


def quieten() -> None:
    """Drop known noise of the libraries, so that what is printed is worth reading."""
    for message in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning_fabric"):
        # Imported before logging was set up, Lightning prints through a handler of its own.
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for handler in logging.getLogger().handlers:
        handler.addFilter(_worth_reading)
    for name in ("onnxscript", "onnx_ir"):  # the exporter tells every step it takes
        logging.getLogger(name).setLevel(logging.WARNING)


# Lightning repeats what our own lines say, or advertises.
_NOISY_LINES = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡",
    "LOCAL_RANK: ",
    "`Trainer.fit` stopped",
    "`weights_only` was not set",
    "Restoring states from",
    "Restored all states",
    "Loaded model weights",
)


def _worth_reading(record: logging.LogRecord) -> bool:
    return not (record.name.startswith(("pytorch_lightning", "lightning")) and _is_noise(record.getMessage()))


def _is_noise(message: str) -> bool:
    return any(words in message for words in _NOISY_LINES)
