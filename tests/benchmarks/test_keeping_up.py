"""Whether loading keeps up, and what it costs to begin: what is typed, what is told."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keeping_up, start_up
from benchmarks.speedups import Measured


def test_a_recipe_beside_one_batch(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In turns; a ratio is within a round."""
    rates, typed = iter([8.0, 10.0, 3.0, 6.0, 9.0, 10.0]), []

    def train(overrides: list[str], folder: Path) -> Measured:
        typed.append(overrides)
        return Measured(next(rates), step_s=0.1, data_wait=0.25, peak_mb=1.0, losses=[], validation_s=None)

    monkeypatch.setattr(keeping_up, "train", train)
    assert keeping_up.main(["experiment=unet_demo", "--rounds", "3", "--steps", "7"]) == 0
    table = capsys.readouterr().out
    assert "| experiment=unet_demo | 8.0 | 10.0 | 0.80 (0.50 to 0.90) | 25% |" in table
    assert all(run[0] == "experiment=unet_demo" and "trainer.max_steps=7" in run for run in typed)
    assert ["trainer.overfit_batches=1" in run for run in typed] == [False, True] * 3


def test_a_recipe_that_does_not_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(keeping_up, "train", lambda overrides, folder: "error: no such manifest")
    assert keeping_up.main(["experiment=unet_demo"]) == 1
    assert "| experiment=unet_demo | error: no such manifest |" in capsys.readouterr().out


def test_the_cost_of_beginning(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seconds, commands = iter([1.0, 3.0, 2.0, 4.0, 5.0, 6.0]), []

    def measure(command: list[str]) -> float:
        commands.append(command)
        return next(seconds)

    monkeypatch.setattr(start_up, "cpu_seconds", measure)
    assert start_up.main(["experiment=unet_demo", "--rounds", "2"]) == 0
    assert "| python train.py --help | 2.00 | 1.00 to 3.00 |" in capsys.readouterr().out
    assert commands[0][1:] == [str(start_up.ROOT / "train.py"), "--help"]
    assert "trainer.max_steps=1" in commands[-1] and "experiment=unet_demo" in commands[-1]


def test_cpu_seconds() -> None:
    """Of the process, not of what it waits for; a command that fails is told by its last line."""
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    assert 0.2 <= start_up.cpu_seconds([sys.executable, "-S", "-c", busy]) < 2
    with pytest.raises(SystemExit, match="^why$"):
        start_up.cpu_seconds([sys.executable, "-S", "-c", "import sys; sys.exit('why')"])
