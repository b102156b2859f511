"""A validation that is not finite is a failed run; all else is Lightning's."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from callbacks.early_stopping import EarlyStopping
from callbacks.not_finite import NotFinite


def fit(tiny: Any, folder: Path, values: list[float], kind: type = EarlyStopping, **options: Any) -> pl.Trainer:
    class Given(tiny.Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(values[self.current_epoch]))

        def on_train_epoch_end(self) -> None:
            self.log("train_loss", torch.tensor(values[self.current_epoch]))

    stopping = kind(**{"monitor": "val_loss", "patience": 1, **options})
    trainer = tiny.make_trainer(folder, [stopping], max_epochs=len(values))
    trainer.fit(Given(), datamodule=tiny.Data())
    return trainer


def test_not_finite_fails(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(NotFinite, match="val_loss is nan: training has diverged, lower model.optim.lr"):
        fit(tiny, tmp_path, [2.0, float("nan"), 1.0])
    assert fit(tiny, tmp_path, [2.0, float("nan"), 1.0], patience=2, check_finite=False).current_epoch == 3


def test_of_a_training_metric_one_says_little(tmp_path: Path, tiny: Any) -> None:
    trainer = fit(tiny, tmp_path, [2.0, float("nan"), 1.0], monitor="train_loss", check_on_train_epoch_end=True)
    assert trainer.current_epoch == 3


def test_it_stops_and_is_kept_as_lightnings(tmp_path: Path, tiny: Any) -> None:
    for kind in (EarlyStopping, pl.callbacks.EarlyStopping):
        trainer = fit(tiny, tmp_path, [2.0, 1.0, 1.5, 0.5], kind)
        assert trainer.current_epoch == 3
        assert trainer.early_stopping_callback.state_key.startswith("EarlyStopping{")
