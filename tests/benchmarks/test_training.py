"""Planning a training within a budget of CPU time, with a train.py that only says what it costs."""

import json
from pathlib import Path

import pytest

from benchmarks import training


class FakeTraining:
    """2 CPU-seconds to start and half of one per step."""

    cpu_s = 0.0
    returns = 0

    def __init__(self, arguments: list[str], *, quiet: bool = False) -> None:
        self.typed = dict(argument.split("=", 1) for argument in arguments)
        FakeTraining.commands.append(self.typed)

    def wait(self) -> int:
        FakeTraining.cpu_s += 2 + 0.5 * int(self.typed["steps"])
        return FakeTraining.returns


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTraining]:
    FakeTraining.commands, FakeTraining.cpu_s, FakeTraining.returns = [], 0.0, 0
    monkeypatch.setattr(training, "_start_train", FakeTraining)
    monkeypatch.setattr(training.clock, "cpu_seconds", lambda: FakeTraining.cpu_s)
    return FakeTraining


def start(work: Path) -> training.OurTraining:
    def length(steps: int) -> list[str]:
        return [f"steps={steps}"]

    plan = training.plan_training(["seed=1"], length=length, epochs=5, cpu_minutes=2.0, reserve=0.1, work=work)
    return training.OurTraining(["seed=1"], length=length, plan=plan, work=work)


def test_the_steps_fill_the_budget_less_calibration_and_reserve(in_tmp: Path, fake: type[FakeTraining]) -> None:
    ours = start(in_tmp)
    left_s = 120 - (2 + 2.5) - (2 + 20)
    affordable = (0.9 * left_s - 2) / 0.5
    assert affordable - 5 < ours.planned <= affordable and ours.planned % 5 == 0
    few, many, real = fake.commands
    assert [few["steps"], many["steps"], real["steps"]] == ["5", "40", str(ours.planned)]
    assert few["seed"] == real["seed"] == "1" and few["exp_manager.name"] != real["exp_manager.name"]
    assert float(real["callbacks.budget.cpu_minutes"]) == pytest.approx(left_s / 60)
    run = in_tmp / "ours" / "stamp"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"cpu_s": 60.0, "steps": 7, "wall_s": 61.0}))
    checkpoint, facts = ours.finish()
    assert checkpoint == run / "checkpoints" / "last.ckpt"
    assert facts["cpu_minutes"] == pytest.approx((60 + 26.5) / 60) and facts["steps"] == 7


def test_a_training_that_fails_is_an_error(in_tmp: Path, fake: type[FakeTraining]) -> None:
    fake.returns = 2
    with pytest.raises(SystemExit, match="our training failed"):
        start(in_tmp)
