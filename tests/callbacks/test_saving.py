"""A full disk: the checkpoint before stays, the run stops or goes on as configured, small files end no run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from callbacks import saving
from callbacks.graceful import GracefulStop
from callbacks.last import LastCheckpoint
from callbacks.metrics_csv import MetricsCsv
from callbacks.plan import Plan
from callbacks.saving import CannotSave, write_text
from callbacks.summary import Summary
from callbacks.tensorboard import TensorBoard
from launch.checkpoint import RunCheckpointIO


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    saving._told.clear()


class FullAt(pl.Callback):
    """The disk takes *room* more bytes during the saves of these steps, and is as before after them."""

    def __init__(self, disk: Any, *steps: int, room: int = 0) -> None:
        self.disk, self.steps, self.room = disk, steps, room

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.disk.left = self.room if trainer.global_step in self.steps else None


def fit(tiny: Any, folder: Path, *callbacks: pl.Callback, stop: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    writer = RunCheckpointIO({}, stop_on_full_disk=stop)
    last = LastCheckpoint(every_n_steps=1)
    trainer = tiny.make_trainer(folder, [*callbacks, last], plugins=[writer], **{"max_steps": 5, **options})
    module = tiny.Tiny()
    trainer.fit(module, datamodule=tiny.Data(validation=False))
    return module


def last_step(folder: Path) -> int:
    (file,) = (folder / "checkpoints").iterdir()  # nothing half-written beside it
    return torch.load(file, weights_only=True)["global_step"]


@pytest.mark.parametrize("seed", range(4))
def test_stop(tmp_path: Path, tiny: Any, disk: Any, seed: int) -> None:
    room = random.Random(seed).randrange(1500) if seed else 0  # of about 3000 bytes
    with pytest.raises(CannotSave) as error:
        fit(tiny, tmp_path, FullAt(disk, 2, room=room), stop=True)
    line = str(error.value)
    assert line.startswith("checkpoints/last.ckpt could not be written (No space left on device): ")
    assert "MiB are free, the one before has 0.0 MiB; make room, exp_manager.resume_if_exists=true" in line
    assert "\n" not in line and last_step(tmp_path) == 1


def test_go_on(tmp_path: Path, tiny: Any, disk: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module = fit(tiny, tmp_path / "a", FullAt(disk, 1, 2, room=700), stop=False)
    said = [record.getMessage() for record in caplog.records if "last.ckpt" in record.getMessage()]
    assert [line.partition(" (")[0].partition(":")[0] for line in said] == [
        "checkpoints/last.ckpt could not be written",
        "checkpoints/last.ckpt could not be written",
        "checkpoints/last.ckpt is saved",
    ]
    assert last_step(tmp_path / "a") == 5
    undisturbed = fit(tiny, tmp_path / "b", stop=False)
    assert torch.equal(module.layer.weight, undisturbed.layer.weight)


def test_a_signal_ends_the_run_all_the_same(
    tmp_path: Path, tiny: Any, disk: Any, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    graceful = GracefulStop()

    class Told(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            graceful.signum = 15 if trainer.global_step == 2 else 0

    fit(tiny, tmp_path, Told(), FullAt(disk, 3), graceful, stop=True)
    assert graceful.stopped and graceful.signum == 15
    assert "SIGTERM: nothing could be saved at step 3" in capfd.readouterr().out
    assert "last.ckpt could not be written" in caplog.text and last_step(tmp_path) == 2


def test_small_files_end_no_run(tmp_path: Path, tiny: Any, disk: Any, caplog: pytest.LogCaptureFixture) -> None:
    loggers = [TensorBoard(save_dir=tmp_path, name="", version=""), MetricsCsv(directory=tmp_path)]
    more = [Plan(), Summary(), FullAt(disk, 2, 3)]
    with pytest.raises(CannotSave):
        fit(tiny, tmp_path, *more, stop=True, logger=loggers)
    assert json.loads((tmp_path / "plan.json").read_text())["machine"]["devices"] == 1
    assert not (tmp_path / "summary.json").exists() and "summary.json cannot be written" in caplog.text
    caplog.clear()

    disk.left = None
    loggers = [TensorBoard(save_dir=tmp_path / "b", name="", version=""), MetricsCsv(directory=tmp_path / "b")]
    fit(tiny, tmp_path / "b", *more, stop=False, logger=loggers)
    table = (tmp_path / "b" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in table] == ["step", "0", "3", "4"], "the rows between could not be written"
    assert caplog.text.count("metrics.csv cannot be written (No space left on device)") == 1
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["status"] == "completed"
    (events,) = (tmp_path / "b").glob("events.*")
    steps = {event.step for event in EventFileLoader(str(events)).Load() if event.HasField("summary")}
    assert 4 in steps, "what comes after the gap can be read"
    assert not list(tmp_path.rglob("*.tmp"))


def test_told_once_until_it_works_again(tmp_path: Path, disk: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.json"
    for left in (None, 3, 3, None, 3):
        disk.left = left
        write_text(path, "whole\n")
        assert path.read_text() == "whole\n"
    assert caplog.text.count("x.json cannot be written") == 2
