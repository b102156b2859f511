"""A run that is killed again and again, at drawn moments, ends bit for bit like the run left alone.

All systems, with one and with two processes, while their layers switch to low rank. Moments are named by what the run
shows, not by a clock: its lines of output, a library that is being loaded, or a place at which tests/faults/moments.py
holds it. What counts is where a kill did hit, read off afterwards; one that missed its place is repeated.
"""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
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
from tests.conftest import OF_THE_MACHINE, RATE, TINY, TINY_ECHO, TINY_NEST, TINY_UNET

pytestmark = pytest.mark.faults
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARK = Path("moment")  # as in moments.py

STEPS_PER_EPOCH = 3  # five batches, two to a step, the last step has one
EPOCHS = {1: 50, 2: 36}
RATIOS = {epoch: round(0.95 - epoch / 60, 3) for epoch in range(3, 50, 5)}  # of the rank, from these epochs on
TINY_OF = {"conv_tasnet": TINY, "deepvqe": TINY_ECHO, "nest": TINY_NEST, "unet": TINY_UNET}
RATE_OF = {"conv_tasnet": 0.02, "deepvqe": 0.005, "nest": 0.01, "unet": 0.01}
START_UP, STEP, WRITE, VALIDATION, SWITCH, TEST = (
    "start-up",
    "training",
    "checkpoint write",
    "validation",
    "low-rank switch",
    "test",
)
# Kills per place and number of processes, for each of the four systems: 60 and 40.
PLAN = {
    1: {START_UP: 1, STEP: 9, WRITE: 2, VALIDATION: 1, SWITCH: 2},
    2: {STEP: 6, WRITE: 1, VALIDATION: 2, SWITCH: 1},
}
_KEPT = ("torchinductor_", ".ses")  # temporary files of libraries that they mean to stay
HELD_AT = {"write": WRITE, "validation": VALIDATION, "before_switch": SWITCH, "in_switch": SWITCH}


def command(system: str, processes: int, data: list[str]) -> list[str]:
    """Everything but the run's name."""
    batch = 1 if system == "nest" and processes == 2 else 2
    examples = 10 * processes
    patience = [] if system == "nest" else ["callbacks.early_stopping.patience=40"]  # at work, but does not stop
    size = {
        "conv_tasnet": [f"data.train_mixtures={examples}", "data.speed=[0.9,1.0,1.1]", "data.gain_db=6"],
        "deepvqe": [f"data.train_examples={examples}"],
        "nest": ["trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=1"],
        "unet": [f"data.train_examples={examples}"],
    }[system]
    key = "model.train_ds.batch_size" if system == "nest" else "data.batch_size"
    replaced = {"data.train_mixtures", "data.train_examples", "data.batch_size", key, "data.loader.num_workers"}
    return [
        f"model={system}",
        *(override for override in TINY_OF[system] if override.partition("=")[0] not in replaced),
        *size,
        *patience,
        *data,
        f"{key}={batch}",
        f"data.loader.num_workers={2 if processes == 1 else 1}",
        f"model.optim.lr={RATE_OF[system]}",
        f"trainer.devices={processes}",
        "trainer.accumulate_grad_batches=2",
        f"trainer.max_epochs={EPOCHS[processes]}",
        "trainer.max_steps=-1",
        "trainer.log_every_n_steps=1",
        "callbacks=[default,low_rank]",
        f"callbacks.low_rank.schedule={{{','.join(f'{epoch}:{ratio}' for epoch, ratio in RATIOS.items())}}}",
        "callbacks.low_rank.min_speedup=0",
        "callbacks.low_rank.min_energy=0",
        "callbacks.last.every_n_steps=2",
        "callbacks.progress.every_n_steps=1",
        "callbacks.figures=null",
        "callbacks.images=null",
        "packages=[moments]",
        "+callbacks.moments={_target_:moments.Moments}",
    ]


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


def start(arguments: list[str], moment: str = "") -> Attempt:
    MARK.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "MOMENT": moment},
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Attempt(process)


def finish(attempt: Attempt, code: int = 0) -> str:
    """Wait for the end; nothing of the process group may be left."""
    until = time.monotonic() + 300
    while attempt.process.poll() is None:
        attempt.read()
        time.sleep(0.02)
        if time.monotonic() > until:
            os.killpg(attempt.process.pid, signal.SIGKILL)
            raise AssertionError(f"hangs:\n{attempt.output}")
    attempt.read()
    assert attempt.process.returncode == code, f"{attempt.process.returncode}, not {code}:\n{attempt.output}"
    assert not survivors(attempt), attempt.output
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


def second_rank(attempt: Attempt) -> int:
    """The process that Lightning has started, by what it was told."""
    children = psutil.Process(attempt.process.pid).children()
    (found,) = [child.pid for child in children if child.environ().get("LOCAL_RANK") == "1"]
    return found


def moment(place: str, number: int) -> str:
    """What moments.py is told; nothing for a place at which a run is not held."""
    if place == SWITCH:
        return f"{('before_switch', 'in_switch')[number % 2]}:{number}"
    return {WRITE: f"write:{number}", VALIDATION: f"validation:{number}"}.get(place, "")


def reached(attempt: Attempt, place: str, number: int, runs: Path) -> bool:
    """Is this the moment? *number*: at which of the moments of this kind, drawn."""
    if place == START_UP:
        if number % 2:  # before the first step
            return bool(attempt.output)
        return "libtorch_cpu" in Path(f"/proc/{attempt.process.pid}/maps").read_text()  # while it is imported
    if place == STEP:
        return len(attempt.steps) >= number and not attempt.in_validation()
    return MARK.exists() if place != TEST else training_is_over(runs)


def training_is_over(runs: Path) -> bool:
    return any('"status": "completed"' in file.read_text() for file in runs.glob("*/summary.json"))


def kill(place: str, number: int, runs: Path, arguments: list[str], signum: int, who: str) -> tuple[Attempt, int]:
    """Start, wait for the moment, send the signal to the `group`, the `main` process or the `second`; the exit code
    that has to follow."""
    for leftover in runs.glob("*/checkpoints/*.tmp"):
        leftover.unlink()  # of a run directory that was given up before its first checkpoint
    attempt = start(arguments, moment(place, number))
    while not reached(attempt, place, number, runs):
        assert attempt.process.poll() is None, f"ended before {place} {number}:\n{attempt.output}"
        time.sleep(0.002)
        attempt.read()
    time.sleep(random.uniform(0, 0.03))
    if who == "second":
        os.kill(second_rank(attempt), signum)
        return attempt, 1
    (os.killpg if who == "group" else os.kill)(attempt.process.pid, signum)
    return attempt, -signum if signum == signal.SIGKILL else 128 + signum


def hit(attempt: Attempt, runs: Path) -> str:
    """Where a process was when it was killed, by what it left."""
    if MARK.exists():
        return HELD_AT[MARK.read_text()]
    if not attempt.steps:
        return START_UP
    if any(runs.glob("*/checkpoints/*.ckpt.tmp")):
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
        "structure": content["structure"],
        "optimiser": content["optimizer_states"],
        "schedule": content["lr_schedulers"],
        "step": content["global_step"],
        "epoch": content["epoch"],
        "data": next(state for name, state in content.items() if name.endswith("Data")),
        "random states": states["RngState"],
        "early stopping": [state for name, state in states.items() if name.startswith("EarlyStopping")],
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
def data_of(manifests: list[str], corpus: Path, photos: Path, in_tmp: Path) -> dict[str, list[str]]:
    """For each system, what it is trained, validated and tested on."""
    noise = 0.05 * np.random.default_rng(0).standard_normal(3 * RATE)
    soundfile.write("noise.wav", noise, RATE)
    write_manifest(in_tmp / "noise.jsonl", [{"audio_filepath": str(in_tmp / "noise.wav"), "duration": 3.0}])
    noisy = f"data.noise_manifest={in_tmp / 'noise.jsonl'}"
    parts = {"train": "train", "val": "validation", "test": "test"}
    return {
        "conv_tasnet": [*manifests, noisy, "data.noise_p=0.7"],
        "deepvqe": [*manifests, noisy],
        "nest": [f"model.{ds}_ds.manifest_filepath={corpus / f'{part}.jsonl'}" for part, ds in parts.items()],
        "unet": [f"data.{part}_manifest={photos / f'{part}.jsonl'}" for part in ("train", "val", "test")],
    }


@pytest.mark.parametrize("processes", [2, 1])
@pytest.mark.parametrize("system", TINY_OF)
def test_kills(
    data_of: dict[str, list[str]],
    in_tmp: Path,
    system: str,
    processes: int,
    record_property: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = time.monotonic()
    temporary = Path(tempfile.mkdtemp())  # not in_tmp: a socket's address is short
    monkeypatch.setenv("TMPDIR", str(temporary))
    base = command(system, processes, data_of[system])
    left_alone, runs = in_tmp / "runs" / "alone" / "x", in_tmp / "runs" / "killed"
    finish(start([*base, "exp_manager.name=alone", "exp_manager.version=x"]))
    expected = result(left_alone)
    assert expected["step"] == EPOCHS[processes] * STEPS_PER_EPOCH and expected["structure"]
    assert expected["random states"] and not expected["leftovers"]

    arguments = [*base, "exp_manager.name=killed", "exp_manager.resume_if_exists=true"]
    rng = random.Random(f"{system} {processes}")
    hits, steps, report = Counter[str](), [0], []

    def strike(place: str, signum: int = signal.SIGKILL, who: str = "group") -> None:
        attempt, code = kill(place, rng.randint(2, 5), runs, arguments, signum, who)
        finish(attempt, code)
        found = hit(attempt, runs) if signum == signal.SIGKILL else signal.Signals(signum).name
        hits[found] += 1
        steps.append(last_step(runs))
        assert steps[-1] >= steps[-2], "a kill lost what was saved"
        if len(attempt.steps) > 3:
            assert steps[-1] > steps[-2], f"{len(attempt.steps)} steps without a checkpoint\n{attempt.output}"
        if signum != signal.SIGKILL:
            assert f"saved checkpoints/last.ckpt at step {steps[-1]}" in attempt.output
        seen = f"steps {attempt.steps[0]} to {attempt.steps[-1]}" if attempt.steps else "no step"
        report.append(f"  {place:<17} {who:<6} -> {found:<17} {seen:<17} checkpoint at step {steps[-1]}")

    wanted = [place for place, times in PLAN[processes].items() for _ in range(times)]
    rng.shuffle(wanted)
    for number, place in enumerate(wanted):
        # The second process only while nobody holds the first.
        who = ("group", "main", "second" if place == STEP and processes == 2 else "group")[number % 3]
        strike(place, who=who)
        if number == 4:
            strike(STEP, signal.SIGTERM, "main")
        if number == 8:
            strike(STEP, signal.SIGINT)
    for place, least in PLAN[processes].items():
        while hits[place] < least:
            assert sum(hits.values()) < 2 * len(wanted), hits
            strike(place)
    if processes == 1:
        strike(TEST)
    finish(start(arguments))
    assert not (left := [path for path in temporary.iterdir() if not path.name.startswith(_KEPT)]), left
    shutil.rmtree(temporary)
    (run,) = {file.parent.parent for file in runs.glob("*/checkpoints/*.ckpt")}

    record_property("kills", {place: times for place, times in hits.items() if not place.startswith("SIG")})
    took = f"{sum(hits.values())} attempts, {time.monotonic() - began:.0f} s"
    record_property("lines", [f"{system}, {processes}: {took}", *report])
    actual = result(run)
    for name, value in expected.items():
        assert_same(actual[name], value, name)
