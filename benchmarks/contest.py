"""The same training with one thing different, for several seeds: what benchmarks of training methods share.

Trainings run one after another, each through the command line in a process of its own and on one thread, and each is
added to a file of JSON lines as soon as it has ended. A second call takes what is there; a training that was
interrupted goes on at its checkpoint. Costs are CPU time of the process tree, start-up and validation included.
"""

import argparse
import csv
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accept import HERE, plain_numbers
from benchmarks.training import ROOT
from data.audio import atomic_path
from data.manifest import read_manifest, write_manifest
from models import load

Row = dict[str, Any]


class Point(NamedTuple):
    """A validation: the step after which it came, the CPU seconds that the training had used at its end, its metric."""

    step: int
    cpu_s: float
    value: float


def load_protocol(name: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / "protocols" / f"{name}.yaml").read_text())


def parser(name: str, purpose: str, protocol: dict[str, Any]) -> argparse.ArgumentParser:
    """The command line of the benchmark `name`, with what every contest is asked."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=purpose.splitlines()[0])
    made.add_argument("--data", type=Path, required=True, help="folder of the protocol's manifest, or demo data")
    made.add_argument("--work", type=Path, default=Path("runs") / name, help="where runs and results go")
    made.add_argument("--seeds", default=",".join(map(str, protocol["seeds"])), help="separated by commas")
    return made


class Contest:
    """Trainings over contestants and seeds, with their results file.

    *protocol*: `recipe`, overrides of all; `cpu_minutes` of each; `manifest_keys`, which take the manifests of training
    and validation; `manifest`, `spared`, `num_val_speakers`, see `talkers`. *data*: the folder with the protocol's
    manifest, or with train.jsonl and val.jsonl as `python -m data.prepare demo` makes them. *work*: where runs and
    results go. *measure*: what to keep of a finished run.
    """

    def __init__(self, protocol: dict[str, Any], *, data: Path, work: Path, measure: Callable[[Path], Row]) -> None:
        self.protocol, self.work, self.measure = protocol, work, measure
        self.file = work / "results.jsonl"
        self.train, self.val, listed = talkers(protocol, data, work)
        self._digest = hashlib.sha256(listed)

    def result(self, contestant: str, seed: int, overrides: list[str]) -> Row:
        """The contestant's row for a seed, from the file where it is there, else from a training."""
        limits = [f"callbacks.budget.cpu_minutes={self.protocol['cpu_minutes']}", f"seed={seed}"]
        typed = [*self.protocol["recipe"], *overrides, *limits]
        key = self._key(typed)
        for row in read_results(self.file):
            if row["key"] == key and row["contestant"] == contestant:
                print(f"{contestant}, seed {seed}: known", flush=True)
                return row
        print(f"{contestant}, seed {seed}: {' '.join(overrides) or 'the recipe'}", flush=True)
        # Changes with all that the training depends on, so that nothing else is ever continued.
        name = f"{contestant.replace(' ', '_')}-seed{seed}-{key[:8]}"
        files = (self.train, self.val)
        manifests = [f"{entry}={file}" for entry, file in zip(self.protocol["manifest_keys"], files, strict=True)]
        run = train([*typed, *manifests, f"exp_manager.exp_dir={self.work}", f"exp_manager.name={name}"])
        row = {"contestant": contestant, "seed": seed, "key": key, "overrides": overrides, **self.measure(run)}
        add_result(self.file, row)
        return read_results(self.file)[-1]  # as a second call will see it

    def _key(self, typed: list[str]) -> str:
        digest = self._digest.copy()
        digest.update(json.dumps(typed).encode())
        return digest.hexdigest()


def talkers(protocol: dict[str, Any], data: Path, work: Path) -> tuple[Path, Path, bytes]:
    """Manifests of training and validation, and what they list.

    Talkers that the protocol named in `spared` tests on are left out, the last `num_val_speakers` others validate.
    """
    ready = [data / "train.jsonl", data / "val.jsonl"]
    if all(file.is_file() for file in ready):
        return ready[0], ready[1], b"".join(file.read_bytes() for file in ready)
    manifest = data / protocol["manifest"]
    if not manifest.is_file():
        raise SystemExit(
            f"error: {manifest}: no such manifest; --data names the folder that holds it, or one made by"
            " python -m data.prepare demo"
        )
    spared = set(load_protocol(protocol["spared"])["test_speakers"])
    rows = [row for row in read_manifest(manifest) if row["speaker"] not in spared]
    names = list(dict.fromkeys(row["speaker"] for row in rows))
    val_names = set(names[-protocol["num_val_speakers"] :])
    if len(names) - len(val_names) < 2:
        raise SystemExit(f"error: {manifest}: {len(names)} talkers are too few, {len(val_names)} of them validate")
    work.mkdir(parents=True, exist_ok=True)
    write_manifest(work / "train.jsonl", [row for row in rows if row["speaker"] not in val_names])
    write_manifest(work / "val.jsonl", [row for row in rows if row["speaker"] in val_names])
    return work / "train.jsonl", work / "val.jsonl", manifest.read_bytes()


def train(overrides: list[str]) -> Path:
    """Train, or go on with what has begun under that name; the run directory."""
    typed = dict(text.split("=", 1) for text in overrides if "=" in text)
    command = [sys.executable, str(ROOT / "train.py"), *overrides, "exp_manager.resume_if_exists=true"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it got the same signal, and saves
        process.wait()
        raise
    folder = Path(typed["exp_manager.exp_dir"]) / typed["exp_manager.name"]
    if code != 0:
        raise SystemExit(f"error: the training in {folder} ended with {code}, see its train.log")
    return max(folder.iterdir(), key=lambda run: run.stat().st_mtime)


def read_results(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def add_result(file: Path, row: Row) -> None:
    """At once and whole, whatever happens to this process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text() if file.is_file() else ""
    with atomic_path(file) as temporary:
        temporary.write_text(before + json.dumps(plain_numbers(row)) + "\n")


def logged(run: Path, *names: str) -> list[tuple[float, ...]]:
    """What metrics.csv has under these names, step first, for the steps that have all of them."""
    columns = ("step", *names)
    with (run / "metrics.csv").open(newline="") as file:
        return [
            tuple(float(row[n]) for n in columns) for row in csv.DictReader(file) if all(row.get(n) for n in columns)
        ]


def curve(run: Path, metric: str) -> list[Point]:
    """The validations of a run; steps are counted from 1."""
    points = [Point(int(step) + 1, cpu_s, value) for step, cpu_s, value in logged(run, "cpu_s", metric)]
    if not points:
        raise SystemExit(f"error: {run / 'metrics.csv'}: no validation with cpu_s and {metric}")
    return points


def points_of(row: Row) -> list[Point]:
    """The curve of a row; JSON has no NaN."""
    return [Point(step, cpu_s, math.nan if value is None else value) for step, cpu_s, value in row["curve"]]


def running_best(points: list[Point]) -> list[Point]:
    """Each validation with the largest metric so far, which the best checkpoint has."""
    best, found = -math.inf, []
    for point in points:
        best = max(best, point.value) if math.isfinite(point.value) else best
        found.append(point._replace(value=best))
    return found


@torch.no_grad()
def size_of(checkpoint: Path, *, seconds: float = 1.0) -> tuple[int, int]:
    """Parameters, and FLOPs of a forward pass over so many seconds of audio (two for a multiply-add)."""
    system = load(checkpoint)
    with FlopCounterMode(display=False) as counter:
        system(torch.zeros(1, round(seconds * system.sample_rate)))
    return sum(parameter.numel() for parameter in system.parameters()), counter.get_total_flops()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(work: Path, result: dict[str, Any]) -> None:
    with atomic_path(work / "result.json") as temporary:
        temporary.write_text(json.dumps(plain_numbers(result), indent=2) + "\n")
    print(f"written: {work / 'result.json'}")
