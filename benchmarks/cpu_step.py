"""What a training step of the demo network costs on this CPU: python -m benchmarks.cpu_step

One thread against more, and glibc keeping freed memory against handing it back, each in a process of its own, in turns,
with and without another program on one of the cores. The table gives the median CPU and wall-clock seconds per step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
STEPS = 10


def measure(threads: int, keep: bool) -> None:
    """In a child: print CPU and wall-clock seconds per step."""
    import torch

    from launch.hardware import keep_freed_memory
    from losses.pit import pit_neg_si_sdr
    from models.conv_tasnet import ConvTasNet

    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory({"accelerator": "cpu"})
    recipe = yaml.safe_load((ROOT / "config" / "experiment" / "conv_tasnet_demo.yaml").read_text())
    system = ConvTasNet(**{name: value for name, value in recipe["model"].items() if name != "optim"})
    batch, samples = recipe["data"]["batch_size"], round(recipe["data"]["segment_s"] * system.sample_rate)
    mixture, sources = torch.randn(batch, samples) * 0.05, torch.randn(batch, 2, samples) * 0.05
    optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)
    for step in range(STEPS + 3):
        if step == 3:
            cpu, wall = time.process_time(), time.perf_counter()
        optimizer.zero_grad()
        pit_neg_si_sdr(system(mixture), sources)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 5.0)
        optimizer.step()
    print((time.process_time() - cpu) / STEPS, (time.perf_counter() - wall) / STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(int(arguments.measure[0]), arguments.measure[1] == "keep")
    cores = len(os.sched_getaffinity(0))
    variants = [(1, "keep"), (1, "return"), (cores, "keep")]
    print(f"{cores} cores; CPU s and wall s per step, median of {arguments.rounds}")
    for busy in (False, True):
        found: dict[tuple[int, str], list[tuple[float, float]]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant in variants:
                found[variant].append(run(*variant, busy=busy))
        print("another program on one core" if busy else "nothing else running (by us)")
        for (threads, memory), values in found.items():
            cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
            kept = "kept" if memory == "keep" else "handed back"
            print(f"  {threads} thread(s), freed memory {kept:<12} {cpu:.3f} CPU s  {wall:.3f} wall s")
    return None


def run(threads: int, memory: str, *, busy: bool) -> tuple[float, float]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, "-m", "benchmarks.cpu_step", "--measure", str(threads), memory]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    finally:
        if other is not None:
            other.kill()
            other.wait()
    cpu, wall = out.split()
    return float(cpu), float(wall)


if __name__ == "__main__":
    main()
