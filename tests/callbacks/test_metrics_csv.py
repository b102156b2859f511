"""metrics.csv: one row per step, new columns, resumed and damaged files."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.metrics_csv import MetricsCsv


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_calls_for_one_step_share_a_row(tmp_path: Path) -> None:
    table = MetricsCsv(directory=tmp_path / "run")
    table.log_metrics({"epoch": 0, "train_loss": 0.5}, step=9)
    table.log_metrics({"epoch": 0, "val_loss": torch.tensor(0.1), "val_si_sdri": float("nan")}, step=9)
    table.log_metrics({"train_loss": 0.25}, step=19)
    assert (tmp_path / "run" / "metrics.csv").read_text() == (
        "epoch,step,train_loss,val_loss,val_si_sdri\n0,9,0.5,0.100000001,nan\n,19,0.25,,\n"
    )
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_value_logged_twice_is_overwritten_in_place(tmp_path: Path) -> None:
    table = MetricsCsv(directory=tmp_path)
    table.log_metrics({"a": 123456.5}, step=1)
    table.log_metrics({"a": 2.0}, step=1)  # shorter than before
    table.log_metrics({"a": 3.0}, step=2)
    assert [row["a"] for row in rows(tmp_path)] == ["2.0", "3.0"]


def test_resume_keeps_what_came_before(tmp_path: Path) -> None:
    first = MetricsCsv(directory=tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step=step)
    second = MetricsCsv(directory=tmp_path)
    second.continue_from(3)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    second.log_metrics({"loss": 30.0, "new": 1.0}, step=3)
    assert [(row["step"], row["loss"], row["new"]) for row in rows(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "30.0", "1.0"),
    ]


def test_the_last_row_of_a_resumed_run_is_still_open(tmp_path: Path) -> None:
    MetricsCsv(directory=tmp_path).log_metrics({"train_loss": 1.0}, step=2)
    table = MetricsCsv(directory=tmp_path)
    table.continue_from(3)
    table.log_metrics({"val_loss": 2.0}, step=2)  # the validation that a stop had cut short
    assert rows(tmp_path) == [{"epoch": "", "step": "2", "train_loss": "1.0", "val_loss": "2.0"}]


def test_without_a_hint_the_first_step_decides(tmp_path: Path) -> None:
    MetricsCsv(directory=tmp_path).log_metrics({"loss": 1.0}, step=4)
    MetricsCsv(directory=tmp_path).log_metrics({"loss": 2.0}, step=9)
    MetricsCsv(directory=tmp_path).log_metrics({"loss": 3.0}, step=6)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("4", "1.0"), ("6", "3.0")]


def test_damaged_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"epoch,step,a\n0,1,0.5\n0,x,1\n0,2,1,1,1\n0,3,0.\xff")
    table = MetricsCsv(directory=tmp_path)
    table.continue_from(3)
    table.log_metrics({"b": 1.0}, step=3)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [("1", "0.5", ""), ("3", "", "1.0")]


def test_foreign_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,score\nx,1\n")
    with pytest.raises(ValueError, match="metrics.csv: not a table of ours"):
        MetricsCsv(directory=tmp_path).log_metrics({"a": 1.0}, step=0)
    assert (tmp_path / "metrics.csv").read_text() == "name,score\nx,1\n"


def test_as_lightning_logger(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [], logger=MetricsCsv(directory=tmp_path), log_every_n_steps=3)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    trainer.test(trainer.lightning_module, datamodule=tiny.Data(), verbose=False)
    table = rows(tmp_path)
    assert list(table[0]) == ["epoch", "step", "val_loss", "train_loss", "test_loss"] or set(table[0]) >= {"test_loss"}
    assert [(row["epoch"], row["step"]) for row in table] == [("0", "2"), ("1", "5"), ("2", "6")]
    assert all(row["train_loss"] and row["val_loss"] for row in table[:2]) and table[2]["test_loss"]
