"""Throughput, data wait, and sums over resumed runs."""

import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger

from callbacks.monitor import Monitor, _batch_size

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
]

KEYS = {"steps", "wall_s", "cpu_s", "examples_per_s", "data_wait_share", "peak_mem_mb"}


class Sleeps(pl.Callback):
    """Takes time in steps, between them (as a slow loader does) and in validation."""

    def __init__(self, *, step: float = 0.0, between: float = 0.0, validation: float = 0.0) -> None:
        self.step, self.between, self.validation = step, between, validation

    def on_before_zero_grad(self, *_: Any) -> None:
        time.sleep(self.step)

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.between)

    def on_validation_batch_start(self, *_: Any) -> None:
        time.sleep(self.validation)


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(value)


def test_measures_steps_and_waiting(tmp_path: Path, tiny: Any) -> None:
    monitor, rows = Monitor(), Rows()
    sleeps = Sleeps(step=0.03, between=0.01, validation=0.05)
    trainer = tiny.make_trainer(tmp_path, [monitor, sleeps], logger=rows, log_every_n_steps=3)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    summary = monitor.summary()
    assert set(summary) == KEYS and summary["steps"] == 6
    assert 20 < summary["examples_per_s"] < 2 / 0.038  # two examples in 40 ms; with validation it were 17 at most
    assert 0.1 < summary["data_wait_share"] < 0.5  # a quarter
    assert summary["peak_mem_mb"] > 50 and summary["cpu_s"] > 0.5 and summary["wall_s"] > 0.5
    assert len(rows.logged["examples_per_s"]) == len(rows.logged["data_wait_share"]) == 2
    assert rows.logged["examples_per_s"][-1] == pytest.approx(monitor.examples_per_s)


def test_saving_a_checkpoint_is_not_waiting_for_data(tmp_path: Path, tiny: Any) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            time.sleep(0.02)

    monitor = Monitor()
    tiny.make_trainer(tmp_path, [monitor, Saves()]).fit(tiny.Tiny(), datamodule=tiny.Data(validation=False))
    assert monitor.summary()["data_wait_share"] == 0.0


def test_sums_over_resumed_runs(tmp_path: Path, tiny: Any) -> None:
    first, second = Monitor(), Monitor()
    trainer = tiny.make_trainer(tmp_path, [first], max_epochs=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["Monitor"]
    assert saved["batches"] == 3 and saved["examples"] == 6
    resumed = tiny.make_trainer(tmp_path, [second], log_every_n_steps=50)
    resumed.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=tmp_path / "x.ckpt")
    assert second.state_dict()["batches"] == 6 and second.state_dict()["examples"] == 12
    assert second.summary()["cpu_s"] > saved["cpu_s"] + 0.5  # this process's own comes on top
    assert second.summary()["steps"] == 6


def test_a_test_of_a_checkpoint_counts_nothing_twice(tmp_path: Path, tiny: Any) -> None:
    monitor = Monitor()
    trainer = tiny.make_trainer(tmp_path, [monitor], max_epochs=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    before = monitor.summary()
    trainer.validate(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=tmp_path / "x.ckpt")
    after = monitor.summary()
    assert after["examples_per_s"] == before["examples_per_s"]
    assert after["cpu_s"] < 1.5 * before["cpu_s"] + 1


def test_before_the_first_batch() -> None:
    summary = Monitor().summary()
    assert summary["examples_per_s"] is None and summary["data_wait_share"] is None and summary["steps"] == 0
    with pytest.raises(ValueError, match="log_every_n_steps=0"):
        Monitor(log_every_n_steps=0)


def test_size_of_a_batch() -> None:
    assert _batch_size({"rate": torch.tensor(8000), "mixture": torch.zeros(5, 7)}) == 5
    assert _batch_size((torch.zeros(3, 2), 1)) == 3
    assert _batch_size({"name": "x"}) == 1
