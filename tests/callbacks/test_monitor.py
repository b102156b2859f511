"""Throughput, data wait, and sums over resumed runs."""

import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger

from callbacks.monitor import Monitor, _batch_size, describe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
]

GPU = {"gpu_mem_mb", "gpu_mem_reserved_mb", "gpu_mem_share"}
LOGGED = {"examples_per_s", "data_wait_share", "step_s", "batch_size", "cpu_load", "host_mem_mb"}
KEYS = {"steps", "wall_s", "cpu_s", "peak_mem_mb"} | LOGGED | GPU


class Clock(pl.Callback):
    """Stands for the module `time`: some goes by in steps, between them (as a slow loader does) and in validation."""

    def __init__(self, *, step: float, between: float, validation: float) -> None:
        self.step, self.between, self.validation = step, between, validation
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_before_zero_grad(self, *_: Any) -> None:
        self.now += self.step

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += self.between

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += self.validation


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(value)


def test_measures_steps_and_waiting(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, rows = Monitor(), Rows()
    clock = Clock(step=0.03, between=0.01, validation=0.05)
    monkeypatch.setattr("callbacks.monitor.time", clock)
    trainer = tiny.make_trainer(tmp_path, [monitor, clock], logger=rows, log_every_n_steps=3)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    summary = monitor.summary()
    assert set(summary) == KEYS and summary["steps"] == 6
    elapsed_s = 6 * 0.03 + 5 * 0.01  # the first batch has no gap before it; validation does not count
    assert summary["examples_per_s"] == pytest.approx(6 * 2 / elapsed_s)
    assert summary["data_wait_share"] == pytest.approx(5 * 0.01 / elapsed_s)
    assert summary["step_s"] == pytest.approx(0.03) and summary["batch_size"] == 2
    assert summary["peak_mem_mb"] > 50 and summary["cpu_s"] > 0.5 and summary["wall_s"] > 0.5
    assert 0 < summary["cpu_load"] <= 1 and summary["host_mem_mb"] > 50
    assert all(summary[name] is None for name in GPU)
    assert set(rows.logged) >= LOGGED and not GPU & set(rows.logged)
    assert all(len(rows.logged[name]) == 2 for name in LOGGED)
    assert rows.logged["examples_per_s"][-1] == pytest.approx(monitor.examples_per_s)
    assert max(rows.logged["host_mem_mb"]) <= summary["host_mem_mb"]


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
    assert second.state_dict()["offered_cpu_s"] > saved["offered_cpu_s"] > 0
    assert second.summary()["host_mem_mb"] >= saved["host_mem_mb"]
    older = {key: value for key, value in saved.items() if key not in ("own_examples", "host_mem_mb")}
    third = Monitor()
    third.load_state_dict(older)
    assert third.summary()["examples_per_s"] == pytest.approx(first.summary()["examples_per_s"])


def test_says_at_the_end_what_training_cost(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="monitor"):
        tiny.make_trainer(tmp_path, [Monitor()]).fit(tiny.Tiny(), datamodule=tiny.Data())
    (block,) = [record.getMessage() for record in caplog.records if record.name == "monitor"]
    told = {line[:15].strip(): line[15:].strip() for line in block.splitlines()}
    names = ["steps", "batch size", "examples/s", "mean step", "data wait", "CPU load", "host memory", "GPU memory"]
    assert list(told) == names
    assert told["steps"] == "6" and told["batch size"] == "2" and told["GPU memory"] == "no GPU"


def test_lines_of_a_gpu_and_of_nothing() -> None:
    empty = Monitor().summary()
    assert "CPU load         not measured" in describe(empty)
    gpu = {"gpu_mem_mb": 100.4, "peak_mem_mb": 300.0, "gpu_mem_reserved_mb": 400.0, "gpu_mem_share": 0.25}
    line = "GPU memory       100 MiB between steps, 300 at most, 400 reserved, 25% of the device taken"
    assert describe(empty | gpu).splitlines()[-1] == line


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
