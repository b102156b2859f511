"""Random states: kept over a resume, moved by training steps only, one per rank."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from callbacks.rng import RngState, _capture, _packed, _restore, _unpacked


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


class Draws(pl.Callback):
    """What a step and a validation draw from all three generators."""

    def __init__(self) -> None:
        self.train: list[tuple] = []
        self.val: list[tuple] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.train.append(draw())

    def on_validation_batch_start(self, *_: Any) -> None:
        self.val.append(draw())


def test_resume_draws_what_would_have_been_drawn(tmp_path: Path, tiny: Any) -> None:
    whole, first, second = Draws(), Draws(), Draws()
    tiny.make_trainer(tmp_path, [RngState(), whole]).fit(tiny.Tiny(), datamodule=tiny.Data())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # another order of things before the run
    state = _capture()
    for draws, epochs, checkpoint in ((whole, 2, None), (first, 1, None), (second, 2, tmp_path / "x.ckpt")):
        if checkpoint is None:
            _restore(state)
            draws.train.clear(), draws.val.clear()
        trainer = tiny.make_trainer(tmp_path, [RngState(), draws], max_epochs=epochs)
        module = tiny.Tiny()
        _restore(state)
        trainer.fit(module, datamodule=tiny.Data(), ckpt_path=checkpoint)
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert first.train + second.train == whole.train and len(whole.train) == 6
    assert first.val + second.val == whole.val and len(whole.val) == 4


def test_validation_does_not_move_training(tmp_path: Path, tiny: Any) -> None:
    drawn = []
    for limit_val_batches in (0, 2):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        draws = Draws()
        trainer = tiny.make_trainer(tmp_path, [RngState(), draws], limit_val_batches=limit_val_batches)
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
        drawn.append(draws.train)
    assert drawn[0] == drawn[1]


def test_state_survives_packing_and_weights_only(tmp_path: Path) -> None:
    np.random.randn()  # leaves a second Gaussian in NumPy's state
    state = _capture()
    expected = draw(), np.random.randn()
    torch.save(_packed(state), tmp_path / "state.pt")
    _restore(_unpacked(torch.load(tmp_path / "state.pt", weights_only=True)))
    assert (draw(), np.random.randn()) == expected


def test_other_number_of_ranks_is_seeded_anew(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.make_trainer(tmp_path, [RngState()], max_epochs=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["callbacks"]["RngState"]["ranks"] *= 4
    torch.save(checkpoint, tmp_path / "x.ckpt")
    drawn = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance), random.seed(disturbance), np.random.seed(disturbance)
        draws = Draws()
        resumed = tiny.make_trainer(tmp_path, [RngState(), draws])
        with caplog.at_level(logging.INFO, logger="callbacks.rng"):
            resumed.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=tmp_path / "x.ckpt")
        drawn.append(draws.train)
    assert drawn[0] == drawn[1]
    assert "the checkpoint has those of 4 process(es), this run has 1; seeded anew" in caplog.text
