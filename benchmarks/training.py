"""Our training as a user would start it, planned to end within a budget of CPU time.

A schedule needs an end: two short runs first tell how many steps the budget holds. They are paid from it.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from callbacks import clock

ROOT = Path(__file__).parent.parent
_CALIBRATION_STEPS = (5, 40)


class Plan(NamedTuple):
    """How many steps a budget holds, what finding that out took of it, and what is left."""

    steps: int
    calibration_s: float
    left_s: float


def plan_training(
    overrides: list[str],
    *,
    length: Callable[[int], list[str]],
    epochs: int,
    cpu_minutes: float,
    reserve: float,
    work: Path,
) -> Plan:
    """What two short runs in the work folder say of a recipe.

    *overrides*: as typed after train.py. *length*: the overrides for so many steps in all. *epochs*: of the recipe;
    the number of steps is a multiple of it, and each ends in the recipe's validation, calibration included.
    *reserve*: share of the budget that is not planned with, for steps that cost more than in the calibration.
    """
    base = [*overrides, f"exp_manager.exp_dir={work}", "exp_manager.name=calibration"]
    costs = []
    for steps in _CALIBRATION_STEPS:
        before = clock.cpu_seconds()
        if _start_train([*base, *length(steps)]).wait() != 0:
            raise SystemExit("error: our training failed, see its messages above")
        costs.append(clock.cpu_seconds() - before)
    few, many = _CALIBRATION_STEPS
    step_s = (costs[1] - costs[0]) / (many - few)
    start_up_s = costs[0] - few * step_s
    left_s = 60 * cpu_minutes - sum(costs)
    affordable = ((1 - reserve) * left_s - start_up_s) / step_s
    planned = epochs * max(1, math.floor(affordable / epochs))
    print(f"ours: {step_s:.3f} CPU-s per step, {planned} steps in what is left of the budget", flush=True)
    return Plan(planned, sum(costs), left_s)


class OurTraining:
    """A recipe through the command line, in a process of its own that is running once this is made.

    *overrides*, *length*, *work*: as `plan_training`. *resume*: continue one that has begun in this work folder.
    """

    def __init__(
        self, overrides: list[str], *, length: Callable[[int], list[str]], plan: Plan, work: Path, resume: bool = False
    ) -> None:
        self.planned, self.calibration_s = plan.steps, plan.calibration_s
        self.folder = work / "ours"
        limits = [*length(plan.steps), f"callbacks.budget.cpu_minutes={plan.left_s / 60}"]
        limits += ["exp_manager.resume_if_exists=true"] * resume
        typed = [*overrides, f"exp_manager.exp_dir={work}", "exp_manager.name=ours", *limits]
        self.process = _start_train(typed, quiet=True)

    def finish(self) -> tuple[Path, dict[str, Any]]:
        """Wait for the end of training; its last checkpoint and what it took."""
        if self.process.wait() != 0:
            raise SystemExit("error: our training failed, see its train.log")
        run = max(self.folder.iterdir(), key=lambda run: run.stat().st_mtime)
        summary = json.loads((run / "summary.json").read_text())
        facts = {
            "cpu_minutes": (summary["cpu_s"] + self.calibration_s) / 60,
            "steps": summary["steps"],
            "planned_steps": self.planned,
            "wall_s": summary["wall_s"],
        }
        print(f"ours: {facts['steps']} steps, {facts['cpu_minutes']:.2f} CPU-minutes with start-up and calibration")
        return run / "checkpoints" / "last.ckpt", facts


def _start_train(arguments: list[str], *, quiet: bool = False) -> subprocess.Popen:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=output)
