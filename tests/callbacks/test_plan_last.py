"""Decisions that are taken once; last.ckpt; optimiser values forced on a resume."""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.last import LastCheckpoint
from callbacks.plan import Plan
from callbacks.resume_override import ResumeOverride


class Line(pl.LightningModule):
    def __init__(self, cosine: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.cosine = cosine

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch * self.weight).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", batch.mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.0)
        if not self.cosine:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return DataLoader(torch.ones(12, 2), batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.ones(2, 2))


def trainer(folder: Path, *callbacks: pl.Callback, max_steps: int = 6, **options) -> pl.Trainer:
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "val_check_interval": 100} | options
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, LastCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


class Decides(pl.Callback):
    def __init__(self, value: int) -> None:
        self.value, self.measured, self.got = value, 0, None

    def measure(self) -> int:
        self.measured += 1
        return self.value

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.got = Plan.of(trainer).decide(trainer, "every", self.measure)


def test_a_decision_is_taken_once_and_survives_a_resume(tmp_path: Path) -> None:
    first = Decides(3)
    trainer(tmp_path, Plan(), first, LastCheckpoint()).fit(Line())
    assert (first.got, first.measured) == (3, 1)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["every"] == 3 and plan["machine"]["devices"] == 1
    content = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert content["plan"]["every"] == 3

    second = Decides(7)
    resumed = trainer(tmp_path / "b", Plan(), second, max_steps=8)
    resumed.fit(Line(), ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (second.got, second.measured) == (3, 0), "a resumed run reads the plan and never measures again"


def test_a_plan_is_needed_by_who_decides(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="callbacks.plan is needed"):
        trainer(tmp_path, Decides(1)).fit(Line())


class Saves(pl.Callback):
    """Notes at which step, and at how many validations, last.ckpt was written."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, int]] = []
        self.validations = 0

    def on_validation_start(self, *_: object) -> None:
        self.validations += 1

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: object) -> None:
        self.noted.append((trainer.global_step, self.validations))


def test_last_is_written_after_validation_and_once_per_step(tmp_path: Path) -> None:
    saves = Saves()
    trainer(tmp_path, saves, LastCheckpoint(every_n_steps=2), max_steps=7, val_check_interval=4).fit(Line())
    assert saves.noted == [(2, 0), (4, 1), (6, 1), (7, 1)]
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match="every_n_steps=0"):
        LastCheckpoint(every_n_steps=0)


def test_last_is_never_written_within_an_accumulation_window(tmp_path: Path) -> None:
    """Six batches, two to a step: validations after 3, 6, 9 … batches fall on steps and between them."""
    saves = Saves()
    windows = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    last = LastCheckpoint(every_n_steps=3)
    trainer(tmp_path, saves, last, max_steps=7, **windows).fit(Line())
    # Step 2 instead of the validation in its first half; step 5 likewise; 6 is due, and has a validation.
    assert saves.noted == [(2, 1), (3, 2), (5, 3), (6, 4), (7, 4)]
    resumed = Saves()
    again = trainer(tmp_path / "b", resumed, LastCheckpoint(every_n_steps=1), max_steps=9, **windows)
    again.fit(Line(), ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert [step for step, _ in resumed.noted] == [8, 9], "not in the first half of step 8"


def test_last_waits_for_the_end_of_a_run_that_is_ending(tmp_path: Path) -> None:
    """What follows the last step - here a validation - would be lost to a run that is resumed at that step."""
    saves = Saves()
    trainer(tmp_path, saves, LastCheckpoint(every_n_steps=1), max_steps=4, val_check_interval=4).fit(Line())
    assert saves.noted == [(1, 0), (2, 0), (3, 0), (4, 1)]
    place = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert place["epoch_progress"]["current"]["processed"] == 1, "written in on_train_end"


@pytest.mark.parametrize("cosine", [False, True])
def test_forced_values_of_the_optimiser(tmp_path: Path, cosine: bool) -> None:
    trainer(tmp_path, LastCheckpoint(), max_steps=2).fit(Line(cosine))
    resumed = trainer(tmp_path / "b", ResumeOverride(values={"lr": 0.1, "momentum": 0.9}), max_steps=3)
    resumed.fit(Line(cosine), ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=True)
    (group,) = resumed.optimizers[0].param_groups
    assert group["momentum"] == 0.9
    # The schedule goes on from where it was, on the new base rate.
    assert group["lr"] == pytest.approx(0.1 * 0.5**3 if cosine else 0.1)
