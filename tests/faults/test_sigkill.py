"""A run that is killed again and again, at drawn moments, ends bit for bit like the run left alone.

Moments are named by what the run shows, not by a clock: its lines of output, a checkpoint that is being written, a
library that is being loaded. What counts is where a kill did hit, read off afterwards; one that missed its place is
repeated.
"""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch

from data.manifest import write_manifest
from models.checkpoint import read_checkpoint
from tests.conftest import OF_THE_MACHINE, RATE, TINY

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent.parent

STEPS_PER_EPOCH = 3  # five batches, two to a step, the last step has one
EPOCHS = 30
CHANGED = {
    "data.train_mixtures": 10,
    "data.batch_size": 2,
    "data.val_mixtures": 12,
    "data.eval_batch_size": 1,
    "data.loader.num_workers": 2,
}
COMMAND = [
    "model=conv_tasnet",
    *(override for override in TINY if override.partition("=")[0] not in CHANGED),
    *(f"{key}={value}" for key, value in CHANGED.items()),
    "data.speed=[0.9,1.0,1.1]",
    "data.gain_db=6",
    "data.noise_p=0.7",
    "model.optim.lr=0.02",
    "model.optim.sched.patience=0",  # reduces in many epochs
    "trainer.accumulate_grad_batches=2",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
    "callbacks.early_stopping.patience=30",  # at work, but does not stop
    "callbacks.last.every_n_steps=2",
    "callbacks.progress.every_n_steps=1",
    "callbacks.figures=null",
]
START_UP, STEP, WRITE, VALIDATION, TEST = "start-up", "training", "checkpoint write", "validation", "test"
PLAN = {START_UP: 3, STEP: 8, WRITE: 4, VALIDATION: 4}  # kills per place; the twentieth comes after training


@dataclass
class Attempt:
    """One process group of train.py, what it printed so far, and where it was killed."""

    process: subprocess.Popen
    output: str = ""
    steps: list[int] = field(default_factory=list)  # of the lines that end a training step
    validated: list[int] = field(default_factory=list)  # of the lines that end a validation

    def read(self) -> None:
        assert self.process.stdout is not None
        while chunk := self.process.stdout.read(65536):
            self.output += chunk.decode()
        whole = self.output[: self.output.rfind("\n") + 1]
        self.steps = [int(step) for step in re.findall(r"^epoch \d+  step (\d+)/", whole, re.MULTILINE)]
        self.validated = [int(step) for step in re.findall(r"^epoch \d+  step (\d+)  val_", whole, re.MULTILINE)]

    def in_validation(self) -> bool:
        return bool(self.steps) and self.steps[-1] % STEPS_PER_EPOCH == 0 and self.steps[-1] not in self.validated


def start(*arguments: str) -> Attempt:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Attempt(process)


def finish(attempt: Attempt, code: int = 0) -> str:
    """Wait for the end; nothing of the process group may be left."""
    while attempt.process.poll() is None:
        attempt.read()
        time.sleep(0.02)
    attempt.read()
    assert attempt.process.returncode == code, attempt.output
    assert not survivors(attempt)
    return attempt.output


def survivors(attempt: Attempt) -> list[psutil.Process]:
    """Of the process group; loader workers that lost their parent have some seconds to notice."""
    for _ in range(200):
        alive = [process for process in psutil.process_iter() if _group(process) == attempt.process.pid]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def half_written(runs: Path) -> bool:
    return any(runs.glob("*/checkpoints/*.ckpt.tmp"))


def reached(attempt: Attempt, place: str, number: int, runs: Path) -> bool:
    """Is this the moment? *number*: at which of the moments of this kind, drawn."""
    if place == START_UP:
        if number % 2:  # before the first step
            return bool(attempt.output)
        return "libtorch_cpu" in Path(f"/proc/{attempt.process.pid}/maps").read_text()  # while it is imported
    if place == STEP:
        return len(attempt.steps) >= number and not attempt.in_validation()
    if place == WRITE:
        return len(attempt.steps) >= number and half_written(runs)
    if place == VALIDATION:
        return len(attempt.steps) >= number and attempt.in_validation()
    return training_is_over(runs)


def training_is_over(runs: Path) -> bool:
    return any('"status": "completed"' in file.read_text() for file in runs.glob("*/summary.json"))


def kill(place: str, number: int, runs: Path, arguments: list[str], signum: int, whole_group: bool) -> Attempt:
    """Start, wait for the moment, send the signal."""
    for leftover in runs.glob("*/checkpoints/*.ckpt.tmp"):
        leftover.unlink()  # of a run directory that was given up before its first checkpoint
    attempt = start(*arguments)
    while not reached(attempt, place, number, runs):
        assert attempt.process.poll() is None, f"ended before {place} {number}:\n{attempt.output}"
        time.sleep(0.0003 if place == WRITE else 0.002)
        attempt.read()
    if place == VALIDATION:
        time.sleep(0.01)  # the line was printed just before it
    (os.killpg if whole_group else os.kill)(attempt.process.pid, signum)
    return attempt


def hit(attempt: Attempt, runs: Path) -> str:
    """Where a process was when it was killed, by what it left."""
    if not attempt.steps:
        return START_UP
    if half_written(runs):
        return WRITE
    if attempt.in_validation():
        return VALIDATION
    return TEST if training_is_over(runs) else STEP


def last_step(runs: Path) -> int:
    files = list(runs.glob("*/checkpoints/last.ckpt"))
    assert len(files) <= 1, "a run that holds a checkpoint is the one that goes on"
    return read_checkpoint(files[0])["global_step"] if files else 0


def result(run: Path) -> dict[str, Any]:
    """What two runs are compared by."""
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    states = content["callbacks"]
    best = next(state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    (best_file,) = (run / "checkpoints").glob("best*.ckpt")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((run / "summary.json").read_text())
    return {
        "weights": content["state_dict"],
        "optimiser": content["optimizer_states"],
        "schedule": content["lr_schedulers"],
        "step": content["global_step"],
        "epoch": content["epoch"],
        "data": content["SeparationData"],
        "random states": states["RngState"],
        "early stopping": next(state for name, state in states.items() if name.startswith("EarlyStopping")),
        "best": (Path(best["best_model_path"]).name, best["best_model_score"], best_file.name),
        "best weights": read_checkpoint(best_file)["state_dict"],
        "metrics.csv": [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in rows],
        "summary": [summary[key] for key in ("status", "metrics", "best_checkpoint", "steps")],
        "leftovers": [file.name for file in run.rglob("*.tmp")],
    }


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}, {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}, {number}")
    else:
        assert one == other, where


@pytest.fixture
def recordings(manifests: list[str], in_tmp: Path) -> list[str]:
    """Overrides that name talkers and a noise."""
    noise = 0.05 * np.random.default_rng(0).standard_normal(3 * RATE)
    soundfile.write("noise.wav", noise, RATE)
    write_manifest(in_tmp / "noise.jsonl", [{"audio_filepath": str(in_tmp / "noise.wav"), "duration": 3.0}])
    return [*manifests, f"data.noise_manifest={in_tmp / 'noise.jsonl'}"]


def test_twenty_kills(recordings: list[str], in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    began = time.monotonic()
    left_alone, runs = in_tmp / "runs" / "alone" / "x", in_tmp / "runs" / "killed"
    finish(start(*recordings, "exp_manager.name=alone", "exp_manager.version=x"))
    expected = result(left_alone)
    rates = [group["lr"] for group in expected["optimiser"][0]["param_groups"]]
    assert rates[0] < 0.02 / 4, "the schedule has work to do"
    assert [int(row["step"]) for row in expected["metrics.csv"]] == list(range(expected["step"] + 1))  # and the test

    arguments = [*recordings, "exp_manager.name=killed", "exp_manager.resume_if_exists=true"]
    rng = random.Random(5)
    wanted = [place for place, times in PLAN.items() for _ in range(times)]
    rng.shuffle(wanted)
    hits, steps, report = Counter[str](), [0], []

    def strike(place: str, signum: int = signal.SIGKILL, whole_group: bool = True) -> None:
        attempt = kill(place, rng.randint(2, 6), runs, arguments, signum, whole_group)
        finish(attempt, -signal.SIGKILL if signum == signal.SIGKILL else 128 + signum)
        found = hit(attempt, runs) if signum == signal.SIGKILL else signal.Signals(signum).name
        hits[found] += 1
        steps.append(last_step(runs))
        assert steps[-1] >= steps[-2], "a kill lost what was saved"
        if len(attempt.steps) > 2:
            assert steps[-1] > steps[-2], "two steps without a checkpoint"
        if found == signal.SIGTERM.name or found == signal.SIGINT.name:
            assert f"saved checkpoints/last.ckpt at step {steps[-1]}" in attempt.output
        seen = f"steps {attempt.steps[0]} to {attempt.steps[-1]}" if attempt.steps else "no step"
        report.append(f"  {place:<17} -> {found:<17} {seen:<17} checkpoint at step {steps[-1]}")

    for number, place in enumerate(wanted):
        strike(place, whole_group=number % 7 != 3)  # now and then the main process alone
        if number in (6, 13):
            strike(STEP, signal.SIGTERM if number == 6 else signal.SIGINT)
    while short := [place for place, least in ((WRITE, 2), (VALIDATION, 2)) if hits[place] < least]:
        assert sum(hits.values()) < 30, hits
        strike(short[0])
    killed_in_training = sum(hits[place] for place in (STEP, WRITE, VALIDATION))
    strike(TEST)
    finish(start(*arguments))
    (run,) = {file.parent.parent for file in runs.glob("*/checkpoints/*.ckpt")}

    with capsys.disabled():
        print(f"\n{sum(hits.values())} attempts, {EPOCHS * STEPS_PER_EPOCH} steps, {time.monotonic() - began:.0f} s")
        print("\n".join(report))
        for place, times in hits.most_common():
            print(f"  {place:<17} {times:>2}  {'#' * times}")
    assert sum(hits.values()) - 2 >= 20 and killed_in_training >= 12
    assert hits[WRITE] >= 2 and hits[VALIDATION] >= 2 and hits[TEST] == 1
    actual = result(run)
    for name, value in expected.items():
        assert_same(actual[name], value, name)
