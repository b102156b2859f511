"""The best checkpoint: replaced by a better one only when that is there."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from callbacks.best import BestCheckpoint
from callbacks.last import LastCheckpoint
from callbacks.resume import ExactResume
from callbacks.saving import CannotSave
from callbacks.summary import Summary
from launch.checkpoint import RunCheckpointIO


class FullAt(pl.Callback):
    """The disk is full while the best checkpoints of these steps are written."""

    def __init__(self, disk: Any, *steps: int) -> None:
        self.disk, self.steps = disk, steps

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.disk.left = 500 if trainer.global_step in self.steps else None

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.disk.left = None


def fit(tiny: Any, folder: Path, *callbacks: pl.Callback, stop: bool = False, kind: type = BestCheckpoint) -> Any:
    class Better(tiny.Tiny):
        """Each validation is better than the one before."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 10.0 - self.global_step)

    best = kind(folder / "checkpoints", filename="best-{step}", monitor="val_loss", enable_version_counter=False)
    writer = RunCheckpointIO({}, stop_on_full_disk=stop)
    every = [ExactResume(), *callbacks, Summary(), best, LastCheckpoint()]
    trainer = tiny.make_trainer(folder, every, plugins=[writer], max_epochs=3)
    try:
        trainer.fit(Better(), datamodule=tiny.Data())
    finally:
        best.files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return best


def test_the_state_is_lightnings(tmp_path: Path, tiny: Any) -> None:
    states = []
    for kind in (ModelCheckpoint, BestCheckpoint):
        best = fit(tiny, tmp_path / kind.__name__, kind=kind)
        assert best.files == ["best-step=9.ckpt", "last.ckpt"]
        content = torch.load(tmp_path / kind.__name__ / "checkpoints" / "last.ckpt", weights_only=True)
        states.append({key: list(state) for key, state in content["callbacks"].items()})
    assert states[0] == states[1] and any(key.startswith("ModelCheckpoint{") for key in states[0])


def test_the_one_before_stays(tmp_path: Path, tiny: Any, disk: Any) -> None:
    """What does not fit at step 6 does at step 9, and then the one of step 3 goes."""
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            best = trainer.checkpoint_callback
            if not best.best_model_path:
                return
            files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
            seen.append((Path(best.best_model_path).name, float(best.best_model_score), files))

    best = fit(tiny, tmp_path, FullAt(disk, 6), Look())
    assert seen[0] == seen[1] == ("best-step=3.ckpt", 7.0, ["best-step=3.ckpt", "last.ckpt"])
    assert best.files == ["best-step=9.ckpt", "last.ckpt"] and Path(best.best_model_path).name == best.files[0]


def test_a_run_that_stops_names_the_one_that_is_there(tmp_path: Path, tiny: Any, disk: Any) -> None:
    class Free(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
            disk.left = None

    with pytest.raises(CannotSave, match="best-step=6.ckpt could not be written"):
        fit(tiny, tmp_path, FullAt(disk, 6), Free(), stop=True)
    text = (tmp_path / "summary.json").read_text()
    assert '"best_checkpoint": "checkpoints/best-step=3.ckpt"' in text and '"status": "failed"' in text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best-step=3.ckpt", "last.ckpt"]
