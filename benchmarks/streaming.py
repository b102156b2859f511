"""What a frame of DeepVQE costs on one core, frame by frame as in a live system: python -m benchmarks.streaming

Every network of config/experiment, in PyTorch, in onnxruntime, and there with 8 bits; in turns, since the machine may
have neighbours. The real-time factor is the median time of a frame over the time that the frame stands for. Weights are
random, which costs as much as trained ones.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from launch import export_stream
from launch.onnx_stream import OnnxStream
from models.base import StreamingStep
from models.deepvqe import DeepVQE
from modules.stft import PRESETS

RECIPES = Path(__file__).parent.parent / "config" / "experiment"
NETWORKS = {
    "n320, deepvqe_16k": ("deepvqe_16k", {}),
    "n512": ("deepvqe_16k", {"stft": "n512"}),
    "n480, deepvqe_paper_24k": ("deepvqe_paper_24k", {}),
    "DeepVQE-S, deepvqe_small": ("deepvqe_small", {}),
    "deepvqe_demo": ("deepvqe_demo", {}),
}


def network(recipe: str, changes: dict[str, Any]) -> DeepVQE:
    """A recipe's system, untrained."""
    model = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()).get("model") or {}
    arguments = {name: value for name, value in model.items() if name != "optim"} | changes
    torch.manual_seed(0)
    return DeepVQE(**arguments, init_identity=False).eval()


def in_torch(step: StreamingStep) -> Callable[[], None]:
    state, signals = dict(step.state), [torch.randn(value.shape) for value in step.inputs.values()]

    def run() -> None:
        _, after = step.module(signals[0], state, *signals[1:])
        state.update(after)

    return run


def in_onnxruntime(step: StreamingStep, path: Path) -> Callable[[], None]:
    stream, signals = OnnxStream(path), [torch.randn(value.shape).numpy() for value in step.inputs.values()]

    def run() -> None:
        stream(*signals)

    return run


@torch.inference_mode()
def measure(system: DeepVQE, *, rounds: int, frames: int) -> dict[str, tuple[float, float]]:
    """Runtime -> median and 95th percentile of the milliseconds that a frame takes."""
    step = system.streaming_step(waveform=False)
    with tempfile.TemporaryDirectory() as folder:
        path, int8 = Path(folder) / "model.onnx", Path(folder) / "model.int8.onnx"
        export_stream.write_step(step, path, opset=18)
        noise = {name: 0.1 * torch.randn(1, step.facts["sample_rate"]) for name in step.inputs}
        export_stream.write_int8(path, int8, step, iter([noise]))
        runs = {
            "PyTorch": in_torch(step),
            "onnxruntime": in_onnxruntime(step, path),
            "onnxruntime, 8 bits": in_onnxruntime(step, int8),
        }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            for _ in range(frames):
                began = time.perf_counter()
                run()
                if number:  # the first round warms up
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {name: (statistics.median(ms), sorted(ms)[int(0.95 * len(ms))]) for name, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    parser.add_argument("--frames", type=int, default=100, help="frames of a measurement")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    print(f"{'network':<26} {'M weights':>9}  {'runtime':<20} {'ms a frame':>10} {'95 %':>7} {'real-time factor':>17}")
    for name, (recipe, changes) in NETWORKS.items():
        system = network(recipe, changes)
        millions = sum(weight.numel() for weight in system.parameters()) / 1e6
        frame_ms = 1e3 * system.stft.hop_samples / PRESETS[system.hparams["stft"]][0]
        for runtime, (median, high) in measure(system, rounds=arguments.rounds, frames=arguments.frames).items():
            figures = f"{median:>10.3f} {high:>7.3f} {median / frame_ms:>17.3f}"
            print(f"{name:<26} {millions:>9.2f}  {runtime:<20} {figures}", flush=True)


if __name__ == "__main__":
    main()
