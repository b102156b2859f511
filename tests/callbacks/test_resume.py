"""A checkpoint written in any hook continues exactly there: same steps, data, validations, schedule, weights."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from callbacks.metrics_csv import MetricsCsv
from callbacks.resume import ExactResume
from callbacks.rng import RngState

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


class SaveEverywhere(Checkpoint):
    """A checkpoint callback, so it comes last in each hook, as Lightning's does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []  # and how many events came before

    def _save(self, trainer: pl.Trainer, place: str) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # gradients that are still being accumulated are in no checkpoint
        path = self.folder / f"{len(self.saved):02d}-{place}-{trainer.global_step}.ckpt"
        self.saved.append((path, len(trainer.lightning_module.events)))
        trainer.save_checkpoint(path)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validated")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_end")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "ended")


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


LAYOUTS = {
    "epochs, a plateau schedule": (dict(max_epochs=2), dict(plateau=True), {}),
    "steps, a plateau schedule": (dict(max_epochs=-1, max_steps=7), dict(plateau=True), {}),
    "validation within epochs": (dict(max_epochs=-1, max_steps=7, val_check_interval=2), dict(plateau=True), {}),
    "validation across epochs": (
        dict(max_epochs=-1, max_steps=7, val_check_interval=2, check_val_every_n_epoch=None),
        {},
        {},
    ),
    "no validation": (dict(max_epochs=-1, max_steps=7), {}, dict(validation=False)),
    "accumulation": (dict(max_epochs=3, accumulate_grad_batches=3), {}, {}),
    "windows that the epoch's end cuts": (
        dict(max_epochs=-1, max_steps=5, accumulate_grad_batches=2),
        dict(plateau=True),
        {},
    ),
    "validation within windows": (
        dict(max_epochs=3, accumulate_grad_batches=2, val_check_interval=1),
        dict(plateau=True),
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda name: name.replace(" ", "_"))
def test_continues_where_it_was_saved(tmp_path: Path, tiny: Any, layout: str) -> None:
    options, module_options, data_options = LAYOUTS[layout]

    def run(checkpoint: Path | None, *more: pl.Callback) -> tuple[pl.LightningModule, pl.Trainer, list]:
        torch.manual_seed(0 if checkpoint is None else 1)
        rows = Rows()
        callbacks = [*more, ExactResume(), RngState()]
        trainer = tiny.make_trainer(tmp_path, callbacks, logger=rows, **options)
        module = tiny.Tiny(**module_options)
        trainer.fit(module, datamodule=tiny.Data(**data_options), ckpt_path=checkpoint)
        return module, trainer, rows.rows

    everywhere = SaveEverywhere(tmp_path)
    whole, trainer, rows = run(None, everywhere)
    times = Counter[str]()
    last_step = trainer.global_step
    tried = 0
    for path, before in everywhere.saved:
        place, step = path.stem.split("-")[1:]
        if int(step) == last_step and (trainer.max_steps != -1 or place in ("epoch_end", "ended")):
            continue  # nothing left to do, Lightning does not start
        times[place] += 1
        if times[place] > 1 and (place, step) != ("step", "3"):
            continue  # of each kind the first, and the step that ends an epoch
        resumed, other, more_rows = run(path)
        tried += 1
        assert resumed.events == whole.events[before:], path.name
        assert more_rows == rows[len(rows) - len(more_rows) :], path.name
        for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, theirs), path.name
        for mine, theirs in zip(other.lr_scheduler_configs, trainer.lr_scheduler_configs, strict=True):
            assert mine.scheduler.state_dict() == theirs.scheduler.state_dict(), path.name
        assert (other.current_epoch, other.global_step) == (trainer.current_epoch, last_step), path.name
    assert tried >= 4


def test_longer_training_goes_on_in_the_middle_of_the_epoch(tmp_path: Path, tiny: Any) -> None:
    def run(steps: int, checkpoint: Path | None = None, *more: pl.Callback) -> pl.LightningModule:
        trainer = tiny.make_trainer(tmp_path, [ExactResume(), RngState(), *more], max_epochs=-1, max_steps=steps)
        module = tiny.Tiny()
        torch.manual_seed(0)
        trainer.fit(module, datamodule=tiny.Data(), ckpt_path=checkpoint)
        return module

    everywhere = SaveEverywhere(tmp_path)
    first = run(4, None, everywhere)  # one step into the second epoch
    longer = run(8)
    trained = [event for event in longer.events if event[0] == "train"]
    for path, _ in everywhere.saved[-2:]:  # epoch_end and ended
        second = run(8, path)
        assert [e for e in first.events + second.events if e[0] == "train"] == trained, path.name


def test_metrics_of_the_checkpoint_are_known_again(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [ExactResume()])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.setdefault("val_loss", float(trainer.callback_metrics["val_loss"]))

    resumed = tiny.make_trainer(tmp_path, [ExactResume(), Look()], max_epochs=3)
    resumed.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=tmp_path / "x.ckpt")
    assert seen["val_loss"] == float(trainer.callback_metrics["val_loss"])


def test_scores_that_a_later_validation_lacks_are_not_kept(tmp_path: Path, tiny: Any) -> None:
    """The validation set of the resumed run has no far-end talk in it."""

    class Scenarios(tiny.Tiny):
        def on_validation_epoch_end(self) -> None:
            if self.trainer.max_epochs == 2:
                self.log("val_far_end", torch.tensor(1.0))

    known: list[set[str]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            known.append({name for name in trainer.callback_metrics if name.startswith("val_")})

    trainer = tiny.make_trainer(tmp_path, [ExactResume()])
    trainer.fit(Scenarios(), datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = tiny.make_trainer(tmp_path, [ExactResume(), Look()], max_epochs=4)
    resumed.fit(Scenarios(), datamodule=tiny.Data(), ckpt_path=tmp_path / "x.ckpt")
    before, after = known[:3], known[3:]
    assert all(names == {"val_loss", "val_far_end"} for names in before), "for schedules and early stopping"
    assert after and all(names == {"val_loss"} for names in after)


def test_metrics_table_forgets_what_came_after_the_checkpoint(tmp_path: Path, tiny: Any) -> None:
    everywhere = SaveEverywhere(tmp_path)
    trainer = tiny.make_trainer(tmp_path, [ExactResume(), everywhere], logger=MetricsCsv(directory=tmp_path))
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    path = next(path for path, _ in everywhere.saved if path.stem.endswith("step-2"))
    steps_of = lambda: [line.split(",")[1] for line in (tmp_path / "metrics.csv").read_text().split()[1:]]  # noqa: E731
    assert steps_of() == ["0", "1", "2", "3", "4", "5"]
    resumed = tiny.make_trainer(
        tmp_path,
        [ExactResume()],
        logger=MetricsCsv(directory=tmp_path),
        max_epochs=-1,
        max_steps=3,
        log_every_n_steps=50,
    )
    resumed.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=path)
    assert steps_of() == ["0", "1", "2"]  # the last one with the metrics of its validation


def test_metrics_table_of_a_run_killed_before_its_first_checkpoint(tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,0,1.0\n0,1,1.0\n")
    trainer = tiny.make_trainer(
        tmp_path, [ExactResume()], logger=MetricsCsv(directory=tmp_path), log_every_n_steps=3, limit_val_batches=0
    )
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert [line.split(",")[1] for line in (tmp_path / "metrics.csv").read_text().split()[1:]] == ["2", "5"]


def test_tensorboard_forgets_what_came_after_the_checkpoint(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read in the order of this number, as text: not from 9 to 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def run(*callbacks: pl.Callback, checkpoint: Path | None = None, **options: Any) -> None:
        logger = TensorBoardLogger(tmp_path, name="", version="")
        trainer = tiny.make_trainer(tmp_path, [ExactResume(), *callbacks], logger=logger, **options)
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=checkpoint)
        logger.finalize("success")

    def steps() -> list[int]:
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return [event.step for event in events.Scalars("train_loss")]

    everywhere = SaveEverywhere(tmp_path)
    run(everywhere)
    assert steps() == [0, 1, 2, 3, 4, 5]
    path = next(path for path, _ in everywhere.saved if path.stem.endswith("step-2"))
    run(checkpoint=path, max_epochs=-1, max_steps=4)
    assert steps() == [0, 1, 2, 3]


def test_a_checkpoint_without_a_place_resumes_as_lightning_does(tmp_path: Path, tiny: Any) -> None:
    everywhere = SaveEverywhere(tmp_path)
    tiny.make_trainer(tmp_path, [everywhere]).fit(tiny.Tiny(), datamodule=tiny.Data())
    path = next(path for path, _ in everywhere.saved if path.stem.endswith("step-2"))
    trainer = tiny.make_trainer(tmp_path, [ExactResume()])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=path)
    assert trainer.global_step == 6
