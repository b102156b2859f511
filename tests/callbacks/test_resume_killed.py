"""A run that is killed at any hook and resumed: the same end, the same files, nothing done twice or not at all."""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from callbacks.graceful import GracefulStop
from callbacks.last import LastCheckpoint
from callbacks.metrics_csv import MetricsCsv
from callbacks.resume import ExactResume
from callbacks.rng import RngState
from callbacks.summary import Summary

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]

WINDOWS = dict(accumulate_grad_batches=2)  # three batches an epoch: its end cuts the second window
LAYOUTS: dict[str, dict[str, Any]] = {
    "epochs": dict(max_epochs=2),
    "stops early within epochs": dict(max_epochs=9, val_check_interval=2),
    "windows": dict(max_epochs=-1, max_steps=5, **WINDOWS),
    "windows, stops early": dict(max_epochs=9, **WINDOWS),
    "validation within windows": dict(max_epochs=3, val_check_interval=1, **WINDOWS),
}


class Killed(BaseException):
    """Nothing of ours is run after it, as after SIGKILL."""


class Kill(Checkpoint):
    """Ends the run in the n-th call of a hook; where it stands among the checkpoint callbacks is where it ends.

    *gently*: by SIGTERM.
    """

    def __init__(self, hook: str, call: int, gently: bool = False) -> None:
        self.left = call

        def kill(*_: Any, **__: Any) -> None:
            self.left -= 1
            if not self.left and gently:
                os.kill(os.getpid(), signal.SIGTERM)
            elif not self.left:
                raise Killed

        setattr(self, hook, kill)


HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda name: name.replace(" ", "_"))
def test_killed_again_and_again(tmp_path: Path, tiny: Any, layout: str) -> None:
    """At drawn hooks, before, between and after the writing of the best and the last checkpoint."""
    rng = random.Random(layout)

    def run(folder: Path, kill: Kill | None = None) -> dict[str, Any] | None:
        last = folder / "checkpoints" / "last.ckpt"
        torch.manual_seed(1 if last.exists() else 0)
        best = ModelCheckpoint(
            dirpath=last.parent, monitor="val_loss", filename="best-{step}", enable_version_counter=False
        )
        stop_early = EarlyStopping(
            monitor="val_loss", mode="max", min_delta=9.0, patience=2 if "early" in layout else 50
        )
        saving: list[pl.Callback] = [best, LastCheckpoint(every_n_steps=2)]
        if kill is not None:
            saving.insert(rng.randint(0, 2), kill)
        table, graceful = MetricsCsv(directory=folder), GracefulStop()
        callbacks = [ExactResume(), RngState(), graceful, Summary(), stop_early, *saving]
        trainer = tiny.make_trainer(folder, callbacks, logger=table, **LAYOUTS[layout])
        module = tiny.Tiny(plateau=True)
        resume = last if last.exists() else None
        try:
            trainer.fit(module, datamodule=tiny.Data(), ckpt_path=resume)
        except Killed:
            return None
        if graceful.stopped:
            return None
        return {
            "weights": [parameter.tolist() for parameter in module.parameters()],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "optimiser": str(trainer.optimizers[0].state_dict()),
            "step": trainer.global_step,
            "best": (Path(best.best_model_path).name, float(best.best_model_score)),
            "files": sorted(file.name for file in last.parent.iterdir()),
            "early stopping": stop_early.state_dict(),
            "rows": table.path.read_text(),
            "summary": json.loads((folder / "summary.json").read_text())["metrics"],
        }

    whole = run(tmp_path / "whole")
    killed, times, step = tmp_path / "killed 0", 0, 0
    while times < 6:
        result = run(killed, Kill(rng.choice(HOOKS), rng.randint(1, 2), gently=rng.random() < 0.3))
        last = killed / "checkpoints" / "last.ckpt"
        reached = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        assert reached >= step
        if result is None:
            times, step = times + 1, reached
        else:  # it survived: the next one
            assert result == whole
            killed, step = tmp_path / f"killed {times}", 0
    assert run(killed) == whole
    assert run(killed) == whole, "nothing is left to do, and nothing is done"


def test_a_validation_that_a_signal_cut_short_is_repeated_once(tmp_path: Path, tiny: Any) -> None:
    def run(kill: Kill | None = None) -> list[tuple]:
        last = tmp_path / "checkpoints" / "last.ckpt"
        callbacks = [ExactResume(), RngState(), GracefulStop(), LastCheckpoint(), *([kill] if kill else [])]
        trainer = tiny.make_trainer(tmp_path, callbacks)
        module = tiny.Tiny()
        with contextlib.suppress(Killed):
            trainer.fit(module, datamodule=tiny.Data(), ckpt_path=last if last.exists() else None)
        return [event[:2] for event in module.events]

    assert run(Kill("on_validation_batch_start", 1, gently=True))[-1] == ("val", 3)
    assert run(Kill("on_train_batch_start", 1)) == [("val", 3), ("val", 3), ("epoch end", 3)]
    assert run()[:2] == [("epoch end", 3), ("train", 3)]


def test_early_stopping_is_not_forgotten(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    def run(patience: int) -> pl.Trainer:
        stop = EarlyStopping(monitor="val_loss", mode="max", min_delta=9.0, patience=patience)
        trainer = tiny.make_trainer(tmp_path, [ExactResume(), stop, LastCheckpoint()], max_epochs=6)
        last = tmp_path / "checkpoints" / "last.ckpt"
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=last if last.exists() else None)
        return trainer

    assert run(patience=1).current_epoch == 2
    with caplog.at_level("INFO", logger="callbacks.resume"):
        again = run(patience=1)
    assert again.current_epoch == 2 and not again.lightning_module.events
    assert "early stopping ended this run; callbacks.early_stopping=null or a higher patience trains on" in caplog.text
    assert run(patience=3).current_epoch == 4, "the one that was typed counts, not that of the checkpoint"


def test_the_best_checkpoint_was_deleted_or_moved(tmp_path: Path, tiny: Any) -> None:
    def run(folder: Path, epochs: int, *more: pl.Callback) -> ModelCheckpoint:
        last = folder / "checkpoints" / "last.ckpt"
        best = ModelCheckpoint(dirpath=last.parent, monitor="val_loss", mode="max", filename="best-{step}")
        callbacks = [ExactResume(), RngState(), best, LastCheckpoint(), *more]
        trainer = tiny.make_trainer(folder, callbacks, max_epochs=epochs)
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=last if last.exists() else None)
        return best

    killed, moved = tmp_path / "killed", tmp_path / "moved"
    first = run(killed, 1)
    shutil.copytree(killed, moved)
    # By a run that was killed before it could write a last.ckpt that names the better one.
    Path(first.best_model_path).unlink()
    assert run(killed, 1).best_model_path == "", "names no file that is not there"
    assert Path(run(killed, 2).best_model_path).name == "best-step=6.ckpt"

    second = run(moved, 2)
    assert second.best_model_score == first.best_model_score and Path(second.best_model_path).parent.parent == moved
    assert [file.name for file in Path(second.best_model_path).parent.glob("best*")] == ["best-step=3.ckpt"]
