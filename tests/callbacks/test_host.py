"""What the machine is doing."""

import subprocess
import sys
import time

import pytest
import torch

from callbacks.host import CpuMeter, gpu_memory, host_memory_mb, num_cores


def test_a_busy_process_uses_a_core() -> None:
    meter = CpuMeter()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    used, offered = meter.take()
    assert 0.15 < used <= offered + 0.05  # the clock of processes ticks in hundredths
    time.sleep(0.1)
    used, offered = meter.take()
    assert used < 0.1 and offered >= 0.1 * num_cores()


def test_memory_of_descendants_counts() -> None:
    before = host_memory_mb()
    code = "x = bytearray(64 * 2**20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert host_memory_mb() - before > 60
        child.communicate(b"\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    assert gpu_memory() == {}
