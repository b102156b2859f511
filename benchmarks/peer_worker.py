"""One side of a comparison of benchmarks/peers.py, in a process of its own: python -m benchmarks.peer_worker <JSON>

Builds what the side does, does it once, says so in a line of JSON on stdout, and then waits: for every number that it
reads it does its job so often, and answers with CPU seconds, wall-clock seconds and the peak of memory so far. Runs in
the Python of either side.
"""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch


def resident_mib(key: str) -> float:
    """VmRSS, what this process holds now, or VmHWM, the most that it ever held since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak() -> None:
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what building the network left over is no head start
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """Time and memory since it was made."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            forget_peak()
            self.before = resident_mib("VmRSS")

    def peak_mib(self) -> float:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident_mib("VmHWM")
        return peak - self.before

    def measure(self, run: Any, times: int) -> dict[str, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(times):
            run()
        if self.cuda:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu_s": cpu / times, "wall_s": wall / times, "peak_mib": self.peak_mib()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print do it elsewhere
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    if task["pair"].startswith("aec_loader"):
        from benchmarks.peer_loader import loader as build
    else:
        from benchmarks.peer_networks import BUILDERS

        build = BUILDERS[task["pair"]]
    job = build(task["side"], task["sizes"], Path(task["work"]), task["device"])
    if task["side"].startswith("ours"):
        from launch.hardware import keep_freed_memory

        gc.collect()
        if task["device"] == "cpu":
            forget_peak()
        keep_freed_memory({"accelerator": task["device"]})
    meter = Meter(task["device"])
    began = time.perf_counter()
    job.run()
    ready = {"losses": job.losses, "first_s": time.perf_counter() - began, "torch": torch.__version__}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        print(json.dumps(meter.measure(job.run, int(line))), file=answers)


if __name__ == "__main__":
    main()
