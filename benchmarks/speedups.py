"""What pays on this machine: python -m benchmarks.speedups experiment=<recipe> [key=value …]

One table, measured side by side in one run: a recipe as a first script has it, the same recipe here, then each
promised speed-up alone on top of that, then all together that paid. What follows the command is what would be typed
after train.py; `model=<system>` stands for its `experiment=<system>_demo`, which a CPU can train.

How it is measured
* Every figure comes from train.py as a user starts it, in a process of its own: of the second half of a few steps
  callbacks/monitor.py tells examples per second (validation and saving excluded), waiting for data and memory.
* Rows take turns, in every round anew, so that a busy machine hits all of them. A ratio is examples per second of a row
  over those of the recipe in the same round; the table has the median over the rounds and their range.
* All runs of a recipe see the same examples: the loss of each step stands beside that of the plain recipe's.
* "first script": the literal network, and for echoes the literal loader, of benchmarks/naive_systems.py, in float32,
  without workers, caches or fused kernels, in our loop. "recipe": ours with the same settings.
* Validation every fifth epoch cannot be seen in steps: its row is computed from the measured time of a step and of a
  validation batch, and the recipe's numbers of both. The STFT cache serves validation: its row is about that.

The demo recipes need `python -m data.prepare demo --output demo_data` (UNet: `demo_photos`).
"""

import argparse
import csv
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir

from benchmarks.peer_loader import COPIES, RECORDINGS, make_recordings
from benchmarks.speedup_report import markdown, write, write_trainer
from benchmarks.speedup_rows import ALL, FIRST, PLAIN, SYSTEMS, Row, base, rows_of
from data.loader import available_cores
from data.manifest import read_manifest

ROOT = Path(__file__).parent.parent
_PAYS = 1.03  # a ratio from which on a row is taken into the combination
_SAME_LOSS = 1e-3  # relative; a float32 network that sums in another order stays far below


class Measured(NamedTuple):
    """One run: what its summary.json says, and the loss of each step."""

    examples_per_s: float
    step_s: float
    data_wait: float
    peak_mb: float
    losses: list[float]
    validation_s: float | None


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    system = _system(options.overrides)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), system)
        rows = rows_of(system, bench.copies)
        if unknown := set(options.only) - {row.name for row in rows}:
            raise SystemExit(f"error: --only {unknown.pop()}: choose from {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if not options.only or row.name in (FIRST, PLAIN, *options.only)]
        not_here = {row.name: reason for row in rows if (reason := row.impossible_here())}
        rows = [row for row in rows if row.name not in not_here]
        print(f"{len(rows)} rows, {options.rounds} rounds of {options.steps} steps, on {_machine()}", flush=True)
        found = bench.measure([row for row in rows if row.measures != "interval"])
        results = [summarise(row, found, bench.failed) for row in rows if row.measures != "interval"]
        results += [bench.interval(row, found) for row in rows if row.measures == "interval"]
        best = combination(rows, results)
        if best is not None:
            again = [row for row in rows if row.name in (FIRST, PLAIN)] + [best]
            results.append(summarise(best, bench.measure(again), bench.failed))
    report = {
        "recipe": options.overrides,
        "machine": _machine(),
        "rounds": options.rounds,
        "steps": options.steps,
        "rows": results,
        "not_here": not_here,
        "command": " ".join(["python train.py", *options.overrides, *(best.overrides if best else ())]),
    }
    text = markdown(report)
    print("\n" + text)
    if options.output:
        write(report, text, options.output)
    if options.write:
        write_trainer(report, best.overrides if best else (), options.write)
    return 1 if PLAIN in bench.failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedups", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="what would be typed after train.py")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a run")
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure; the first two always are")
    parser.add_argument("--output", type=Path, help="folder for speedups.md, .json and .png")
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT / "config" / "trainer" / "this_machine.yaml",
        help="write what paid as trainer=this_machine",
    )
    options = parser.parse_args(argv)
    options.overrides = [
        f"experiment={name}_demo" if (name := text.removeprefix("model=")) in SYSTEMS and text != name else text
        for text in options.overrides
    ]
    return options


def _system(overrides: Sequence[str]) -> str:
    named = next((text.partition("=")[2] for text in overrides if text.startswith(("experiment=", "model="))), "")
    system = next((system for system in SYSTEMS if named.startswith(system)), None)
    if system is None:
        raise SystemExit(f"error: name a recipe: experiment=<recipe> or model={'|'.join(SYSTEMS)}")
    return system


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {available_cores()} cores"
    file = Path("/proc/cpuinfo")
    entries = [line.partition(":") for line in file.read_text().splitlines()] if file.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in entries}  # of the last core, which is like the others
    bf16 = "bf16 instructions" if {"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split()) else "no bf16"
    name = facts.get("model name", platform.machine())
    return f"{name}, {available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}, {bf16}"


class Bench:
    """Runs of a recipe. Attributes: `failed`, rows that did not run, with the line that says why; `copies`, of echo
    cancellation a manifest of the training recordings at the network's rate."""

    def __init__(self, options: argparse.Namespace, folder: Path, system: str) -> None:
        self.options, self.folder, self.system = options, folder, system
        self.failed: dict[str, str] = {}
        self.copies: Path | None = None
        self.data: list[str] = []
        if system == "deepvqe":
            make_recordings(folder, manifest=None, count=12, seconds=10.0)
            self.data = [f"data.{stage}_manifest={folder / RECORDINGS}" for stage in ("train", "val")]
            self.data += ["data.test_manifest=null", "data.noise_manifest=null", "data.rir_manifest=null"]
            self.copies = folder / COPIES
        self._count = 0

    def measure(self, rows: Sequence[Row]) -> dict[str, list[Measured]]:
        """Of each row as many runs as there are rounds; of one that fails none."""
        found: dict[str, list[Measured]] = {row.name: [] for row in rows}
        for number in range(self.options.rounds):
            for row in rows:
                if row.name in self.failed:
                    continue
                run = self.run(row)
                if isinstance(run, str):
                    self.failed[row.name] = run
                    print(f"  {row.name}: {run}", flush=True)
                else:
                    found[row.name].append(run)
                    print(f"  {number + 1}  {row.name}: {run.examples_per_s:.2f} examples/s", flush=True)
        return found

    def run(self, row: Row) -> Measured | str:
        self._count += 1
        typed = [*base(self.system, self.data, row, self.options.steps), *row.overrides]
        return train([*self.options.overrides, *typed], self.folder / f"run{self._count}")

    def interval(self, row: Row, found: dict[str, list[Measured]]) -> dict[str, Any]:
        """A row that is computed: an epoch takes its steps and its validation, or a fifth of one."""
        result: dict[str, Any] = {"row": row.name, "overrides": list(row.overrides)}
        plain = [run for run in found.get(PLAIN, []) if run.validation_s is not None]
        steps, batches = epoch_of(self.options.overrides, self.system)
        if not plain or not batches:
            return result | {"failed": "nothing is validated"}
        ratios = []
        for run in plain:
            train_s, val_s = steps * run.step_s / (1 - run.data_wait), batches * (run.validation_s or 0.0)
            ratios.append((train_s + val_s) / (train_s + val_s / 5))
        about = (
            f"computed: {steps} steps of {plain[0].step_s:.3f} s, {batches} batches of {plain[0].validation_s:.3f} s"
        )
        return result | {"to_recipe": _spread(ratios), "computed": about}


def train(overrides: Sequence[str], folder: Path) -> Measured | str:
    """A run in *folder*, in a process of its own; or the line with which it failed."""
    where = [f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}", "exp_manager.version=x"]
    command = [sys.executable, str(ROOT / "train.py"), *overrides, *where]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    run = folder / "x"
    with (run / "metrics.csv").open() as file:
        return measured(list(csv.DictReader(file)), json.loads((run / "summary.json").read_text()))


def measured(lines: Sequence[Mapping[str, str]], summary: Mapping[str, Any]) -> Measured:
    """*lines*: of metrics.csv, a step each. The second half counts: in the first, code is compiled and caches fill."""

    def column(name: str) -> list[float]:
        return [float(value) for line in lines if (value := line.get(name))]

    def later(name: str) -> list[float]:
        values = column(name)
        return values[len(values) // 2 :]

    timings = column("validation_step_timing in s")
    return Measured(
        examples_per_s=statistics.harmonic_mean(later("examples_per_s")),
        step_s=statistics.fmean(later("step_s")),
        data_wait=statistics.fmean(later("data_wait_share")),
        peak_mb=summary["peak_mem_mb"],
        losses=column("train_loss"),
        validation_s=timings[-1] if timings else None,
    )


def epoch_of(overrides: Sequence[str], system: str) -> tuple[int, int]:
    """Steps between two validations of a recipe, and batches in one."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "config")):
        cfg = compose("train", list(overrides))
    if system == "nest":
        section = cfg.model.validation_ds
        rows = len(read_manifest(section.manifest_filepath)) if section.manifest_filepath else 0
        return int(cfg.trainer.val_check_interval), math.ceil(rows / section.batch_size)
    data = cfg.data
    name = "mixtures" if system == "conv_tasnet" else "examples"
    examples, validated = (data[f"{stage}_{name}"] or 0 for stage in ("train", "val"))
    return max(1, examples // data.batch_size), math.ceil(validated / (data.eval_batch_size or data.batch_size))


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def summarise(row: Row, found: dict[str, list[Measured]], failed: dict[str, str]) -> dict[str, Any]:
    """Medians of a row, its ratios to both baselines round by round, and how its losses compare with the recipe's."""
    result: dict[str, Any] = {"row": row.name, "overrides": list(row.overrides)}
    runs, plain = found.get(row.name, []), found.get(PLAIN, [])
    if row.name in failed or not runs or not plain:
        return result | {"failed": failed.get(row.name, "the recipe itself did not run")}
    for key in ("examples_per_s", "step_s", "data_wait", "peak_mb"):
        result[key] = statistics.median(getattr(run, key) for run in runs)
    for key, others in (("to_recipe", plain), ("to_first", found.get(FIRST, []))):
        if row.measures == "validation":
            ratios = [
                other.validation_s / run.validation_s
                for run, other in zip(runs, others, strict=False)
                if run.validation_s and other.validation_s
            ]
        else:
            ratios = [run.examples_per_s / other.examples_per_s for run, other in zip(runs, others, strict=False)]
        if ratios:
            result[key] = _spread(ratios)
    if row.measures == "validation":
        result.pop("to_first", None)
    result["loss"] = compare_losses(runs[0].losses, plain[0].losses, row)
    if row.measures == "validation":
        result["loss"] = "of validation"
    return result


def compare_losses(losses: list[float], plain: list[float], row: Row) -> str:
    """In words: whether the curve stayed the same."""
    if row.losses:
        return row.losses
    count = min(len(losses), len(plain))
    if count == 0:
        return "not logged"
    apart = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, plain, strict=False)]
    if max(apart) < _SAME_LOSS:
        return "the same"
    means = [sum(curve[-10:]) / len(curve[-10:]) for curve in (losses[:count], plain[:count])]
    return f"{(means[0] - means[1]) / max(abs(means[1]), 1e-12):+.1%} at the end"


def combination(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> Row | None:
    """What paid in every round, and does not exclude one another: of each kind the best."""
    paid: dict[str, tuple[float, Row]] = {}
    for row, result in ((row, result) for row in rows for result in results if result["row"] == row.name):
        ratio = result.get("to_recipe")
        if row.name in (FIRST, PLAIN) or ratio is None or not row.free:
            continue
        better = ratio["median"] > paid.get(row.kind, (0.0, row))[0]
        if ratio["median"] >= _PAYS and ratio["least"] > 1.0 and better:
            paid[row.kind] = (ratio["median"], row)
    if not paid:
        return None
    chosen = [row for _, row in sorted(paid.values(), key=lambda pair: -pair[0])]
    overrides = tuple(dict.fromkeys(text for row in chosen for text in row.overrides))
    return Row(ALL, overrides, losses=next((row.losses for row in chosen if row.losses), ""))


if __name__ == "__main__":
    raise SystemExit(main())
