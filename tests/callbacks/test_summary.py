"""summary.json: the keys that other programs rely on, and its content in each kind of end."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from callbacks.graceful import GracefulStop
from callbacks.monitor import Monitor
from callbacks.summary import Summary

# Keys may be added, never renamed or removed.
FROZEN = {
    "metrics",
    "best_checkpoint",
    "bad_files",
    "steps",
    "wall_s",
    "cpu_s",
    "examples_per_s",
    "data_wait_share",
    "peak_mem_mb",
    "step_s",
    "batch_size",
    "cpu_load",
    "host_mem_mb",
    "gpu_mem_mb",
    "gpu_mem_reserved_mb",
    "gpu_mem_share",
    "versions",
    "status",
}


def read(root: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((root / "summary.json").read_text(), parse_constant=refuse)


def test_after_training_and_test(tmp_path: Path, tiny: Any) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss", filename="best-{step}")
    trainer = tiny.make_trainer(tmp_path, [Monitor(), Summary(), best])
    module, data = tiny.Tiny(), tiny.Data()
    trainer.fit(module, datamodule=data)
    summary = read(tmp_path)
    assert set(summary) == FROZEN
    assert set(summary["versions"]) == {"python", "torch", "torchaudio", "pytorch_lightning"}
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["status"] == "completed" and summary["steps"] == 6
    assert (tmp_path / summary["best_checkpoint"]).is_file() and summary["best_checkpoint"].startswith("checkpoints/")
    assert set(summary["metrics"]) == {"train_loss", "val_loss"} and summary["examples_per_s"] > 0
    assert summary["metrics"]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))

    trainer.test(module, datamodule=data, verbose=False)
    tested = read(tmp_path)
    assert set(tested["metrics"]) == {"train_loss", "val_loss", "test_loss"} and tested["steps"] == 6
    assert tested["best_checkpoint"] == summary["best_checkpoint"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_test_alone_adds_to_what_is_there(tmp_path: Path, tiny: Any) -> None:
    tiny.make_trainer(tmp_path, [Monitor(), Summary()]).fit(tiny.Tiny(), datamodule=tiny.Data())
    trained = read(tmp_path)
    tiny.make_trainer(tmp_path, [Summary()]).test(tiny.Tiny(), datamodule=tiny.Data(), verbose=False)
    summary = read(tmp_path)
    test_loss = summary["metrics"].pop("test_loss")
    assert summary == trained and test_loss > 0


def test_without_monitor_and_with_values_that_json_lacks(tmp_path: Path, tiny: Any) -> None:
    class Logs(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.log("train_nan", float("nan"))
            self.log("val_inf", float("inf"))

    tiny.make_trainer(tmp_path, [Summary(), Logs()]).fit(tiny.Tiny(), datamodule=tiny.Data())
    summary = read(tmp_path)
    assert set(summary) == FROZEN and summary["steps"] == 6
    assert summary["metrics"]["train_nan"] is None and summary["metrics"]["val_inf"] is None
    assert summary["best_checkpoint"] is None
    assert summary["cpu_s"] is None and summary["step_s"] is None and summary["cpu_load"] is None


@pytest.mark.parametrize(("fault", "status"), [("signal", "stopped"), ("exit", "stopped"), ("error", "failed")])
def test_status(tmp_path: Path, tiny: Any, fault: str, status: str) -> None:
    class Fault(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if fault == "error":
                raise ArithmeticError
            if fault == "exit":  # a signal where no GracefulStop is at work
                raise SystemExit(143)
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = tiny.make_trainer(tmp_path, [Monitor(), Summary(), GracefulStop(), Fault()], max_epochs=-1, max_steps=9)
    try:
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    except (ArithmeticError, SystemExit):
        assert fault != "signal"
    assert read(tmp_path)["status"] == status
