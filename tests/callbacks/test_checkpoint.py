"""All of these callbacks together: what they put into a checkpoint is plain, and a run with them resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from callbacks.budget import Budget
from callbacks.figures import AudioFigures
from callbacks.graceful import GracefulStop
from callbacks.metrics_csv import MetricsCsv
from callbacks.monitor import Monitor
from callbacks.progress import Progress
from callbacks.resume import ExactResume
from callbacks.rng import RngState
from callbacks.summary import Summary

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_together(tmp_path: Path, tiny: Any, num_workers: int) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> Any:
        kinds = [Budget, AudioFigures, GracefulStop, Monitor, Progress, ExactResume, RngState, Summary]
        loggers = [TensorBoardLogger(tmp_path, name="", version=""), MetricsCsv(directory=tmp_path)]
        trainer = tiny.make_trainer(tmp_path, [kind() for kind in kinds], logger=loggers, max_epochs=epochs)
        torch.manual_seed(0)
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data(num_workers=num_workers), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return trainer.lightning_module

    whole, first = run(2), run(1)
    state = torch.load(tmp_path / "1.ckpt", weights_only=True)["callbacks"]
    assert {"Monitor", "Budget", "ExactResume", "RngState"} <= set(state)
    second = run(2, tmp_path / "1.ckpt")
    assert first.events + second.events == whole.events
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
