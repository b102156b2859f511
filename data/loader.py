"""One place that builds a `DataLoader`: settings that fit the machine, and none that torch refuses.

Decisions that are not obvious
* Workers ignore SIGINT and outlive a SIGTERM for a while. Ctrl-C and batch systems signal the whole process
  group; a worker that dies of it takes down the step that the main process wants to finish and save.
* On Linux a worker dies with the process that it works for, strictly with the thread that began to iterate. By
  itself it would look for that every five seconds, and complain when it meets a connection that is gone.
* The loader has a random generator of its own. Otherwise every new iterator draws a number from the global
  one and a resumed run, which makes its iterators at other moments, would continue with other random
  numbers.
* A dataset with a method `receive` is given each batch in the main process, when it is used, and may change it.
* What a dataset's `kept` holds (data/kept.py) is not loaded again. It stands there and not in the loader, in whose
  place Lightning puts another one where it overfits.
* Torch itself limits each worker to one thread (`torch.get_num_threads() == 1` there; a test keeps an eye
  on it).
"""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.checks import whole_number
from data.forking import CheckedForkContext
from data.worker_folder import worker_folder

_MAX_WORKERS = 8
_GRACE_S = 30  # seconds that a worker lives on after SIGTERM; the grace period of SLURM and Kubernetes
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the one that started it ends
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, or its container's quota if that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.is_file():
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def choose_loader_settings(
    *,
    num_workers: int | str = "auto",
    prefetch_factor: int = 4,
    pin_memory: bool | str = "auto",
    persistent_workers: bool = True,
    multiprocessing_context: str | None = None,
    accelerator: str = "cpu",
    cores: int = 1,
    processes: int = 1,
) -> dict[str, Any]:
    """Replace every "auto" and leave out what torch refuses.

    Workers: the cores are shared among the training processes of the machine. With more than two cores per
    process, one is left to the training itself and up to eight load. With one or two, a GPU training gets
    one worker (it has the other core, or waits for the GPU anyway) and a CPU training none: its step keeps
    all cores busy, and a worker would only take turns with it.

    Args:
        num_workers: number of worker processes, "auto" chooses.
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: page-locked batches; "auto" is on for cuda only, elsewhere torch warns.
        persistent_workers: keep workers between epochs.
        multiprocessing_context: start method of workers (fork, forkserver, spawn); None is the platform's.
        accelerator: "cpu", "cuda", ...
        cores: cores available on this machine, see `available_cores`.
        processes: training processes on this machine.

    Returns:
        Keyword arguments for `DataLoader`.

    Raises:
        ValueError: a value of the wrong kind; the message names its key.
    """
    if num_workers == "auto":
        own_cores = cores // processes
        num_workers = min(_MAX_WORKERS, own_cores - 1) if own_cores > 2 else int(accelerator != "cpu")
    elif isinstance(num_workers, str):
        raise ValueError(f"loader.num_workers must be a whole number or auto, got {num_workers!r}")
    num_workers = whole_number("loader.num_workers", num_workers, least=0)
    prefetch_factor = whole_number("loader.prefetch_factor", prefetch_factor, least=1)
    if pin_memory == "auto":
        pin_memory = accelerator == "cuda"
    if not isinstance(pin_memory, bool):
        raise ValueError(f"loader.pin_memory must be true, false or auto, got {pin_memory!r}")
    if not isinstance(persistent_workers, bool):
        raise ValueError(f"loader.persistent_workers must be true or false, got {persistent_workers!r}")
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing_context is not None and multiprocessing_context not in methods:
        raise ValueError(
            f"loader.multiprocessing_context must be one of {', '.join(methods)}, got {multiprocessing_context!r}"
        )
    settings: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
    if num_workers == 0:
        return settings
    return settings | {
        "prefetch_factor": prefetch_factor,
        "persistent_workers": persistent_workers,
        "multiprocessing_context": multiprocessing_context,
    }


def make_loader(
    dataset: Dataset,
    *,
    sampler: Sampler,
    batch_size: int,
    num_workers: int | str = "auto",
    prefetch_factor: int = 4,
    pin_memory: bool | str = "auto",
    persistent_workers: bool = True,
    multiprocessing_context: str | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    accelerator: str = "cpu",
    processes: int = 1,
) -> DataLoader:
    """A loader over `sampler`'s items. A last incomplete batch is left out when the sampler has `drop_last`.

    Arguments beyond `DataLoader`'s own are those of `choose_loader_settings`.
    """
    settings = choose_loader_settings(
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        multiprocessing_context=multiprocessing_context,
        accelerator=accelerator,
        cores=available_cores(),
        processes=processes,
    )
    if settings["num_workers"]:
        method = settings["multiprocessing_context"] or multiprocessing.get_start_method(allow_none=True)
        method = method or multiprocessing.get_all_start_methods()[0]  # the platform's
        settings["multiprocessing_context"] = CheckedForkContext() if method == "fork" else method
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=bool(getattr(sampler, "drop_last", False)),
        collate_fn=collate_fn,
        worker_init_fn=functools.partial(_prepare_worker, worker_folder() if settings["num_workers"] else None),
        generator=torch.Generator(),
        **settings,
    )


class _Loader(DataLoader):
    """See the head of this file about `receive` and `kept`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        kept = getattr(self.dataset, "kept", None)
        return self._loaded() if kept is None else kept.all_of_a_pass(self._loaded, len(self))

    def _loaded(self) -> Iterator[Any]:
        batches, receive = super().__iter__(), getattr(self.dataset, "receive", None)
        return batches if receive is None else map(receive, batches)

    @property
    def _index_sampler(self) -> Any:
        sampler, kept = super()._index_sampler, getattr(self.dataset, "kept", None)
        return sampler if kept is None else kept.behind(sampler)


def _prepare_worker(folder: str | None, worker: int) -> None:
    """Leave the end of the run to the main process (see the head of this file). *folder*: for temporary files."""
    if folder is not None:
        tempfile.tempdir = folder
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        # An alarm that nobody handles ends the process: a worker told to terminate does not stay for ever.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.excepthook = functools.partial(_tell, sys.excepthook)


def _tell(hook: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What a worker's thread that hands out batches raises, unless only the process that fetched one is gone."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        hook(kind, error, trace)
