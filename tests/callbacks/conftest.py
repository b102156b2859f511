"""A tiny system, its data with a position, and a Trainer without noise, for the tests of callbacks."""

import errno
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.sampler import EpochSampler

NUM_BATCHES = 3
NUM_VAL_BATCHES = 2


class Items(torch.utils.data.Dataset):
    """Item (index, epoch) holds both numbers, so that a test sees which data a step was given."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {"x": torch.tensor([float(key[0]), float(key[1])])}


class Data(pl.LightningDataModule):
    """Three training batches of two, two validation batches; continues in the middle of an epoch."""

    def __init__(self, *, validation: bool = True, num_workers: int = 0) -> None:
        super().__init__()
        self.validation = validation
        self.num_workers = num_workers
        self.at = {"epoch": 0, "batch": 0}

    def state_dict(self) -> dict[str, int]:
        loop = self.trainer.fit_loop
        complete = loop.epoch_loop._num_ready_batches_reached()
        epoch = max(0, loop.epoch_progress.current.started - 1) + complete
        return {"epoch": epoch, "batch": 0 if complete else loop.epoch_loop.batch_progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.at = state_dict

    def train_dataloader(self) -> DataLoader:
        items = Items(2 * NUM_BATCHES)
        sampler = EpochSampler(items, seed=3, start_epoch=self.at["epoch"], skip=2 * self.at["batch"])
        return DataLoader(items, batch_size=2, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> Any:
        items = Items(NUM_VAL_BATCHES)
        sampler = EpochSampler(items, shuffle=False, drop_last=False, fixed_epoch=0)
        return DataLoader(items, batch_size=1, sampler=sampler) if self.validation else []

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class Tiny(pl.LightningModule):
    """One weight, a random number in every training and validation step, and a list of what happened."""

    def __init__(self, *, plateau: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.plateau = plateau
        self.events: list[tuple] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["x"]
        self.events.append(("train", self.global_step, self.current_epoch, x[:, 0].tolist(), x[0, 1].item()))
        loss = (self.layer(x[:, :1] / 6) + torch.rand(1)).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        draw = torch.rand(1).item()
        self.events.append(("val", self.global_step, batch_idx, draw))
        self.log("val_loss", self.layer(batch["x"][:, :1]).abs().mean() + draw)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch["x"][:, :1]).abs().mean())

    def on_train_epoch_end(self) -> None:
        self.events.append(("epoch end", self.global_step, self.current_epoch))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.events.append(("plateau", self.global_step, float(metric)))
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        if not self.plateau:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def make_trainer(root: Any, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 2,
    }
    return pl.Trainer(default_root_dir=root, callbacks=callbacks, **{**defaults, **options})


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Any:
    """The module with the helpers: `tiny.Tiny`, `tiny.Data`, `tiny.make_trainer`."""
    from types import SimpleNamespace

    return SimpleNamespace(
        Tiny=Tiny, Data=Data, make_trainer=make_trainer, num_batches=NUM_BATCHES, num_val_batches=NUM_VAL_BATCHES
    )


class Disk:
    """While `left` is a number, files opened for writing take so many bytes, of all together; then the disk is full."""

    def __init__(self) -> None:
        self.left: int | None = None

    def open(self, path: Path, mode: str) -> Any:
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                if disk.left is None:
                    return super().write(view) or 0
                taken = min(len(view), disk.left)
                disk.left -= super().write(view[:taken]) or 0
                if taken < len(view):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return taken

        return Raw(path, mode.replace("b", ""))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that can be made full: what `Path.open` and `Path.write_text` write."""
    found, real = Disk(), Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writing = any(letter in mode for letter in "wa+")
        raw = found.open(path, mode if "b" in mode else f"{mode}b") if writing and found.left is not None else None
        if raw is None:
            return real(path, mode, *args, **kwargs)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: _write(opened(path, "w"), text))
    return found


def _write(file: Any, text: str) -> None:
    with file:
        file.write(text)
