"""NeMo's names for how long steps take."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from callbacks.step_timing import StepTiming


class Kept(pl.Callback):
    """What was logged in each training batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(v) for name, v in trainer.callback_metrics.items() if name.endswith(" in s")})


@pytest.mark.parametrize("buffer_size", [1, 2])
def test_times(buffer_size: int, tiny: Any, tmp_path: Path) -> None:
    timing, kept = StepTiming(buffer_size=buffer_size), Kept()
    now = iter(float(n * n) for n in range(1000))  # each question a second later than the one before, and more
    timing._now = lambda: next(now)  # type: ignore[method-assign]
    trainer = tiny.make_trainer(tmp_path, [timing, kept], max_epochs=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    # A step asks four times: start, backward starts, backward ends, end; in squares of 0, 1, 2, …
    steps = [(4 * n + 3) ** 2 - (4 * n) ** 2 for n in range(tiny.num_batches)]
    backward = [(4 * n + 2) ** 2 - (4 * n + 1) ** 2 for n in range(tiny.num_batches)]
    for name, values in (("train_step", steps), ("train_backward", backward)):
        means = [
            sum(values[max(0, n - buffer_size + 1) : n + 1]) / min(buffer_size, n + 1) for n in range(tiny.num_batches)
        ]
        assert [step[f"{name}_timing in s"] for step in kept.steps] == means
    first = 4 * tiny.num_batches
    validations = [(first + 2 * n + 1) ** 2 - (first + 2 * n) ** 2 for n in range(2)]
    assert float(trainer.callback_metrics["validation_step_timing in s"]) == sum(validations) / 2


@pytest.mark.parametrize("wrong", [{"buffer_size": 0}, {"buffer_size": 1.5}, {"buffer_size": True}, {"sync_cuda": 1}])
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        StepTiming(**wrong)
