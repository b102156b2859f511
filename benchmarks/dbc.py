"""What low-rank gradients cost and how good they are: python -m benchmarks.dbc

A table of factorisations: time against a full SVD, error against the best of that rank, all in turns in one run
(matrices with singular values 1/i, a rank of 10 %). With --step, the hook's share of a training step of NEST small, and
how often callbacks.dbc.every=auto would call it.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor

from callbacks.dbc import DBC
from callbacks.hook_clock import steps_between
from models.nest import NEST
from modules import gradient_compression_guide as guide
from modules.gradient_compression import rank_of
from modules.range_finder import OVERSAMPLING, randomised, warm

ROOT = Path(__file__).parent.parent
SIZES = ("256x256", "512x512", "1000x1000", "5000x256", "100x256x256")
QUICK_SIZES = ("64x64", "5x64x48")
RATIO = 0.1
NOISE = 0.3  # of the gradient before, from which `warm` starts
SAMPLES_PER_FRAME = 160 * 8  # mel frames of 10 ms at 16 kHz, eight to a frame of the encoder
VARIANTS: dict[str, dict[str, Any]] = {
    "warm, damp": {"method": "warm", "residual": "damp"},
    "warm, ef": {"method": "warm", "residual": "ef"},
    "rsvd": {"method": "rsvd", "residual": "damp"},
    "full SVD": {"method": "svd", "residual": "damp"},
    "guide, first": {"method": "guide", "residual": "none"},
    "guide, second": {"method": "guide", "residual": "none", "energy": 0.95},
}


# The table


def matrices(size: str) -> tuple[Tensor, Tensor]:
    """Stacked matrices of singular values 1/i, (B, M, N), and these."""
    *stacked, m, n = (int(part) for part in size.split("x"))
    shape, generator = (stacked[0] if stacked else 1, m, n), torch.Generator().manual_seed(0)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(shape[0], side, k, generator=generator)).Q for side in (m, n))
    values = 1 / torch.arange(1, k + 1)
    return (u * values) @ v.mT, values


def contestants(a: Tensor, rank: int) -> dict[str, Callable[[], Tensor]]:
    """Each returns its approximation of the stack; the full SVD comes first."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(a.shape, generator=generator)
    scale = NOISE * torch.linalg.matrix_norm(a) / torch.linalg.matrix_norm(noise)
    basis = randomised(a + scale[:, None, None] * noise, rank, generator=generator).basis

    def full() -> Tensor:
        u, s, v = torch.linalg.svd(a, full_matrices=False)
        return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]

    def svd_lowrank() -> Tensor:
        u, s, v = torch.svd_lowrank(a, q=min(rank + OVERSAMPLING, *a.shape[-2:]), niter=2)
        return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank].mT

    def product(find: Callable[[], Any]) -> Tensor:
        found = find()
        return found.left @ found.right

    return {
        "full SVD": full,
        "torch.svd_lowrank": svd_lowrank,
        "ours, rsvd": lambda: product(lambda: randomised(a, rank, generator=generator)),
        "ours, warm": lambda: product(lambda: warm(a, basis, generator=generator)),
        "guide, first": lambda: torch.stack([guide.first(matrix, rank, generator=generator) for matrix in a]),
        "guide, second": lambda: torch.stack([guide.second(matrix, rank, generator=generator) for matrix in a]),
    }


def compare(size: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each contestant: median time, how many times faster than the full SVD, error over the best."""
    a, values = matrices(size)
    rank = rank_of((a.shape[1], a.shape[2]), RATIO)
    best = float(values[rank:].norm())
    found = contestants(a, rank)
    results = {name: call() for name, call in found.items()}  # warm-up, too
    errors = {name: float(torch.linalg.matrix_norm(a - r).mean()) / best for name, r in results.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, call in found.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    full = medians["full SVD"]
    return [
        {"size": size, "name": name, "ms": 1e3 * taken, "speed_up": full / taken, "error_over_best": errors[name]}
        for name, taken in medians.items()
    ]


# The step


def nest_small(frames: int) -> tuple[NEST, dict[str, Tensor]]:
    """The network of experiment=nest_small and one recording of so many frames of the encoder."""
    recipe = yaml.safe_load((ROOT / "config" / "experiment" / "nest_small.yaml").read_text())["model"]
    torch.manual_seed(0)
    samples = frames * SAMPLES_PER_FRAME
    clean, length = 0.1 * torch.randn(1, samples), torch.tensor([samples])
    noisy = clean + 0.03 * torch.randn(1, samples)
    batch = {"audio": clean, "length": length, "noisy": noisy, "noisy_length": length}
    return NEST(encoder=recipe["encoder"], optim=recipe["optim"]), batch | {"mask_seed": torch.tensor([1])}


def measure_step(system: NEST, batch: dict[str, Tensor], steps: int, max_share: float) -> list[dict[str, Any]]:
    """A row for each variant: the hook's median time and share of a step, timed directly, on the same gradients."""
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-4)
    hooks = {name: DBC(every=1, **options) for name, options in VARIANTS.items()}
    took: dict[str, list[float]] = {name: [] for name in hooks}
    rest: list[float] = []
    for step in range(steps + 1):
        trainer: Any = SimpleNamespace(global_step=step)
        started = time.perf_counter()
        optimizer.zero_grad()
        system.step(batch)["loss"].backward()
        spent = time.perf_counter() - started
        plain = {p: p.grad.clone() for p in system.parameters() if p.grad is not None}
        for name, hook in hooks.items():
            for parameter, gradient in plain.items():
                parameter.grad.copy_(gradient)  # type: ignore[union-attr]
            started = time.perf_counter()
            with warnings.catch_warnings(action="ignore"):  # nowhere to log without a Trainer
                hook.on_before_optimizer_step(trainer, system, optimizer)
            took[name].append(time.perf_counter() - started)
        for parameter, gradient in plain.items():
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        started = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        optimizer.step()
        rest.append(spent + time.perf_counter() - started)
    without = statistics.median(rest[1:])  # the first one allocates, and starts cold
    rows = []
    for name, times in took.items():
        hook_s = statistics.median(times[1:])
        share = hook_s / (without + hook_s)
        every = steps_between(share, max_share)
        rows.append({"name": name, "hook_s": hook_s, "step_s": without, "share": share, "every": every})
    return rows


# On the screen


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: a line for each size, in each column the speed-up and the error over the best."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = ["| size | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        cells = [f"{row['speed_up']:.1f}x, {row['error_over_best']:.3f}" for row in of_size]
        cells[0] = f"{of_size[0]['ms']:.3g} ms, {of_size[0]['error_over_best']:.3f}"
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_markdown(rows: list[dict[str, Any]], max_share: float) -> str:
    """The hook's share of a step, a line for each variant."""
    lines = [f"| method | hook, ms | share of a step | every, for at most {max_share:.0%} |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['name']} | {1e3 * row['hook_s']:.3g} | {row['share']:.1%} | {row['every']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dbc", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help="MxN, or BxMxN for a stack; none: no table")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each, in turns")
    parser.add_argument("--step", action="store_true", help="measure the hook's share of a NEST-small step, too")
    parser.add_argument("--frames", type=int, default=4096, help="of the encoder in that step; 4096 need about 19 GiB")
    parser.add_argument("--steps", type=int, default=3, help="such steps, after a first one")
    parser.add_argument("--max-share", type=float, default=0.05, help="as callbacks.dbc.max_share")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.sizes, arguments.repeats = list(QUICK_SIZES), 2
        arguments.frames, arguments.steps = 32, 2

    result: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if arguments.sizes:
        result["table"] = [row for size in arguments.sizes for row in compare(size, arguments.repeats)]
        print("Times faster than the full SVD (its time in ms), error over the best of that rank\n")
        print(markdown(result["table"]))
    if arguments.step:
        result["frames"] = arguments.frames
        result["step"] = measure_step(*nest_small(arguments.frames), arguments.steps, arguments.max_share)
        step_s = result["step"][0]["step_s"]
        print(f"\nNEST small, {arguments.frames} frames, a step without the hook: {step_s:.3g} s\n")
        print(step_markdown(result["step"], arguments.max_share))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
