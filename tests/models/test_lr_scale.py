"""`scale_lr_with_batch`: rates follow the batch of a step, in all groups, and a resume goes on with those it had."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks.resume_override import ResumeOverride
from data.base import SystemData
from launch.errors import ConfigError
from launch.resume import take_over
from models.optim import check_optim, lr_scale


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(
    built: Any, folder: Path, *callbacks: pl.Callback, steps: int, ckpt_path: Path | None = None, accumulate: int = 1
) -> list[list[float]]:
    """The rates of each step. Leaves last.ckpt in the folder."""
    rates = Rates()
    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        **bare,  # type: ignore[arg-type]
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[rates, *callbacks],
    )
    trainer.fit(built.system, datamodule=built.data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return rates.seen


def test_the_scale() -> None:
    assert lr_scale({"lr": 1.0}, 64) == 1.0
    assert lr_scale({"scale_lr_with_batch": 8}, 64) == 8.0
    assert lr_scale({"scale_lr_with_batch": 64, "scale_lr_rule": "sqrt"}, 16) == 0.5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scale_lr_with_batch": 0}, "scale_lr_with_batch must be null or a whole number of examples, got 0"),
        ({"scale_lr_with_batch": True}, "scale_lr_with_batch must be null or a whole number of examples, got True"),
        ({"scale_lr_with_batch": 8.5}, "scale_lr_with_batch must be null or a whole number"),
        ({"scale_lr_rule": "cubic"}, "scale_lr_rule must be one of linear, sqrt, got 'cubic'"),
        ({"scale_lr_rule": ["sqrt"]}, "scale_lr_rule must be one of linear, sqrt"),
    ],
)
def test_values_that_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"model.optim.{says}"):
        check_optim({"lr": 0.1, **wrong})


def test_every_group_and_every_process(
    built: Callable,
    tiny: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(SystemData, "_rank_and_world", lambda self: (0, 2))
    typed = [*tiny["nest"], "model.train_ds.batch_size=2", "model.optim.lr=1.0", "model.optim.sched.name=none"]
    typed += ["+model.optim_param_groups.encoder.lr=0.5", "model.optim.scale_lr_with_batch=4"]
    with caplog.at_level(logging.INFO):
        rates = fit(built(*typed), tmp_path, steps=1, accumulate=2)
    assert rates == [[2.0, 1.0]]
    line = "learning rate 1 x 2 = 2, 0.5 x 2 = 1: for 8 examples a step (4 x 2 accumulated), where model.optim.lr is"
    assert f"{line} meant for 4" in caplog.messages


SEPARATION = ["model.optim.lr=0.25", "model.optim.scale_lr_with_batch=2", "model.optim.sched.name=cosine"]
SEPARATION += ["model.optim.sched.min_lr=0.0625"]


def test_a_schedule_and_a_resume_with_another_batch(
    built: Callable, tiny: dict[str, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = [*tiny["conv_tasnet"], *SEPARATION, "data.train_mixtures=32"]
    whole = fit(built(*typed, batch_size=4), tmp_path, steps=4)
    assert whole[0] == [0.5] and 0.0625 < whole[3][0] < whole[2][0] < whole[1][0]
    (tmp_path / "half").mkdir()
    system = built(*typed, batch_size=4)
    stopped = fit(system, tmp_path / "half", StopAfter(2), steps=4)
    assert stopped == whole[:2]
    again = fit(built(*typed, batch_size=8), tmp_path, steps=4, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert again == whole[2:], "the floor of the schedule too"
    line = "the checkpoint's learning rate goes on, scaled by 2; a new run with 8 examples a step (8 x 1 accumulated)"
    assert f"{line} would scale it by 4" in caplog.messages
    forced = ResumeOverride(values={"lr": 0.125})
    forced_rates = fit(built(*typed, batch_size=8), tmp_path, forced, steps=4, ckpt_path=tmp_path / "half/last.ckpt")
    assert forced_rates == [[rate / 2 for rate in rates] for rates in whole[2:]], "scaled as well"


class StopAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


def test_a_rate_that_falls_below_the_schedules_floor(
    built: Callable, tiny: dict[str, list[str]], tmp_path: Path
) -> None:
    typed = [*tiny["conv_tasnet"], *SEPARATION, "model.optim.scale_lr_with_batch=64"]
    with pytest.raises(MisconfigurationException, match=r"model.optim.lr=0.0078125 is below model.optim.sched.min_lr"):
        fit(built(*typed, batch_size=2), tmp_path, steps=1)


def test_a_resume_does_not_force_it() -> None:
    config = {"resume_override": ["optim.scale_lr_with_batch"], "model": {"optim": {"scale_lr_with_batch": 4}}}
    with pytest.raises(ConfigError, match="resume_override=optim.scale_lr_with_batch: only values of the optimiser"):
        take_over({}, config)
