"""What the machine is doing: CPU load, memory of the process tree, memory of the GPU.

Each question costs milliseconds, as it looks at every process of the machine, and none waits for the GPU: asked once
in so many steps, not in each.
"""

import os
import time

import psutil
import torch

from callbacks import clock


class CpuMeter:
    """What share of its cores the process tree (callbacks/clock.py) has used since it was last asked."""

    def __init__(self) -> None:
        self._used_s, self._asked_at = clock.cpu_seconds(), time.perf_counter()

    def take(self) -> tuple[float, float]:
        """CPU seconds used since the last time, and CPU seconds that there were: elapsed time x cores."""
        used_before, asked_before = self._used_s, self._asked_at
        self._used_s, self._asked_at = clock.cpu_seconds(), time.perf_counter()
        # A process that ends while it is being asked is missing for once.
        return max(0.0, self._used_s - used_before), (self._asked_at - asked_before) * num_cores()


def num_cores() -> int:
    """Cores that this process may run on; the limit of a container that only gets a part of their time is not seen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory_mb() -> float:
    """MiB resident in this process and its descendants; what several of them share counts in each."""
    own = psutil.Process()
    total = own.memory_info().rss
    for process in own.children(recursive=True):
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended between the listing and the question
    return total / 2**20


def gpu_memory() -> dict[str, float]:
    """Of this process's GPU; nothing where it uses none.

    `gpu_mem_mb`: MiB that tensors take now, between two steps. `gpu_mem_reserved_mb`: MiB that torch ever held for
    them. `gpu_mem_share`: how much of the device is taken, 0 to 1, by this and all other processes.
    """
    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu_mem_mb": torch.cuda.memory_allocated() / 2**20,
        "gpu_mem_reserved_mb": torch.cuda.max_memory_reserved() / 2**20,
        "gpu_mem_share": (total - free) / total,
    }
