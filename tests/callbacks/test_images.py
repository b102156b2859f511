"""Images in TensorBoard, PNG files after a test."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.figures import AudioFigures
from callbacks.images import ImageFigures


class Pictures(torch.utils.data.Dataset):
    """Item i is red with a level of 10 i, so that a test knows whose image it sees."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.zeros(3, 4, 6, dtype=torch.uint8)
        image[0] = 10 * index
        return {"image": image}


class Finder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return 0 * self.gain

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": torch.tensor(0.0), "probability": self.gain * torch.linspace(-1, 2, 24).view(1, 1, 4, 6)}

    test_step = validation_step

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        heat = output["probability"][0].expand(3, 4, 6)
        return {"image": batch["image"][0], "heat": heat, "signal": heat[0, 0], "mask": heat[:1]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader() -> DataLoader:
    return DataLoader(Pictures(), batch_size=3)


def events(root: Path) -> EventAccumulator:
    return EventAccumulator(str(root), size_guidance={"audio": 0, "images": 0}).Reload()


def test_tensorboard(tmp_path: Path, tiny: Any) -> None:
    """Images, every so many epochs; signals are the other callback's, which leaves images alone."""
    logger = TensorBoardLogger(save_dir=tmp_path, name="", version="", default_hp_metric=False)
    callbacks = [ImageFigures(every_n_epochs=2, num_examples=2), AudioFigures()]
    trainer = tiny.make_trainer(tmp_path, callbacks, logger=logger, max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(Finder(), loader(), loader())
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {"0_image", "1_image", "0_heat", "1_heat"} and not found.Tags()["audio"]
    assert [event.step for event in found.Images("1_image")] == [2, 6]  # epochs 0 and 2
    shown = np.asarray(Image.open(io.BytesIO(found.Images("1_image")[0].encoded_image_string)))
    assert shown.shape == (4, 6, 3) and (shown == [10, 0, 0]).all()


def test_files_to_look_at(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [ImageFigures(num_look=4), AudioFigures()])
    trainer.test(Finder(), loader(), verbose=False)
    names = {f"{i}_{tag}.png" for i in range(4) for tag in ("image", "heat")}
    assert {file.name for file in (tmp_path / "look").iterdir()} == names and not (tmp_path / "listen").exists()
    assert (np.asarray(Image.open(tmp_path / "look" / "3_image.png")) == [30, 0, 0]).all()
    heat = np.asarray(Image.open(tmp_path / "look" / "0_heat.png"))[..., 0].ravel()
    expected = np.linspace(-1, 2, 24).clip(0, 1) * 255
    assert np.abs(heat - expected).max() <= 0.51 and heat[0] == 0 and heat[-1] == 255


def test_a_system_without_figures(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Finder, "figures")
    tiny.make_trainer(tmp_path, [ImageFigures()]).test(Finder(), loader(), verbose=False)
    assert not (tmp_path / "look").exists()


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_look=-1"):
        ImageFigures(num_look=-1)


def test_a_map_is_drawn_in_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From black to pale yellow, and so large that a small one is seen."""
    levels = torch.tensor([[0.0, 1.0, 2.0], [float("nan"), 0.5, -1.0]])
    monkeypatch.setattr(Finder, "figures", lambda *_: {"map": levels})
    (image,) = ImageFigures().select(Finder(), Finder().figures({}, {})).values()
    assert image.shape == (3, 128, 126) and image.dtype == torch.uint8
    corners = image[:, ::64, ::42].permute(1, 2, 0)
    black, yellow = [0, 0, 8], [255, 250, 190]
    assert corners[0].tolist() == [black, yellow, yellow]
    assert corners[1].tolist() == [black, [158, 40, 112], black]
