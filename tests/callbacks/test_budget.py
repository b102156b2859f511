"""A budget ends training, counts earlier runs, and is off by default."""

from pathlib import Path
from typing import Any

import pytest

from callbacks import clock
from callbacks.budget import Budget


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes by one minute with every question."""
    asked: list[float] = []

    def cpu_seconds() -> float:
        asked.append(60.0 * (len(asked) + 1))
        return asked[-1]

    monkeypatch.setattr(clock, "cpu_seconds", cpu_seconds)
    return asked


def test_ends_training_with_a_validation(
    tmp_path: Path, tiny: Any, minutes: list[float], capsys: pytest.CaptureFixture
) -> None:
    trainer = tiny.make_trainer(tmp_path, [Budget(cpu_minutes=2)])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert trainer.global_step == 2
    assert "val_loss" in trainer.callback_metrics
    printed = capsys.readouterr().out
    assert "budget: 2.00 of 2 CPU-minutes used (" in printed and "training ends at step 2\n" in printed


def test_counts_the_runs_that_are_resumed(tmp_path: Path, tiny: Any, minutes: list[float]) -> None:
    budget = Budget(cpu_minutes=5)
    budget.load_state_dict({"cpu_s": 180.0})
    trainer = tiny.make_trainer(tmp_path, [budget])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert trainer.global_step == 2
    assert budget.state_dict() == {"cpu_s": 180.0 + minutes[-1]}


def test_off_by_default(tmp_path: Path, tiny: Any, minutes: list[float]) -> None:
    trainer = tiny.make_trainer(tmp_path, [Budget()])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert trainer.global_step == 6 and not minutes


@pytest.mark.parametrize("wrong", [0, -1.5, float("nan")])
def test_refuses_nonsense(wrong: float) -> None:
    with pytest.raises(ValueError, match="cpu_minutes="):
        Budget(cpu_minutes=wrong)
