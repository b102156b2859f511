"""Lines of text without a terminal, a bar with one, nothing of Lightning's own."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from callbacks.monitor import Monitor
from callbacks.progress import Progress


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "progress"]


def test_lines_of_text(
    tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="progress")
    trainer = tiny.make_trainer(tmp_path, [Monitor(), Progress(every_n_steps=2)], num_sanity_val_steps=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    train = [line for line in lines(caplog) if "lr" in line]
    assert [line.split("  ")[:2] for line in train] == [
        ["epoch 0", "step 2/6"],
        ["epoch 1", "step 4/6"],
        ["epoch 1", "step 6/6"],
    ]
    pattern = r"  loss [\d.e-]+  lr 1\.00e-01  [\d.e+]+ examples/s  data wait \d+%  left 0:00:0\d$"
    assert all(re.search(pattern, line) for line in train), train
    assert [line.split("val_loss")[0] for line in lines(caplog) if "val_loss" in line] == [
        "epoch 0  step 3  ",
        "epoch 1  step 6  ",
    ]
    trainer.test(trainer.lightning_module, datamodule=tiny.Data(), verbose=False)
    assert lines(caplog)[-1] == "test 2/2"
    captured = capfd.readouterr()
    assert not captured.out and "it/s" not in captured.err  # no bar


@pytest.mark.parametrize(("micro_batches", "per_line"), [(1, 2), (2, 3)])  # of two, an epoch's last step has but one
def test_loss_is_the_mean_since_the_last_line(
    micro_batches: int, per_line: int, tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="progress")
    losses: list[float] = []

    class Noted(tiny.Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    trainer = tiny.make_trainer(tmp_path, [Progress(every_n_steps=2)], accumulate_grad_batches=micro_batches)
    trainer.fit(Noted(), datamodule=tiny.Data())
    shown = [float(re.search(r"loss (\S+)", line)[1]) for line in lines(caplog) if "lr" in line]  # type: ignore[index]
    assert shown == [
        pytest.approx(sum(losses[i : i + per_line]) / per_line, rel=1e-3) for i in range(0, len(losses), per_line)
    ]


def test_endless_training_says_no_end(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    caplog.set_level(logging.INFO, logger="progress")
    trainer = tiny.make_trainer(tmp_path, [Progress(every_n_steps=3), Ends()], max_epochs=-1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    (line,) = [line for line in lines(caplog) if "lr" in line]
    assert "step 3  " in line and "left" not in line


def test_bar_on_a_terminal(
    tmp_path: Path,
    tiny: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, logger="progress")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress()
    trainer = tiny.make_trainer(tmp_path, [progress], num_sanity_val_steps=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    captured = capfd.readouterr()
    assert "Epoch 1: 100%" in captured.err and not captured.out and not lines(caplog)
    assert "v_num" not in captured.err


def test_lightning_adds_none_of_its_own(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [Progress()])
    assert [type(c) for c in trainer.callbacks if isinstance(c, ProgressBar)] == [Progress]
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Progress(every_n_steps=0)
