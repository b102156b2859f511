"""Audio and spectrograms in TensorBoard, WAV files after a test."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import soundfile
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.figures import AudioFigures

RATE = 8000


class Sounds(torch.utils.data.Dataset):
    """Item i is a constant of i tenths, so that a test knows whose signal it sees."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"mixture": torch.full((1000,), index / 10), "length": torch.tensor(1000)}


class Separator(pl.LightningModule):
    sample_rate = RATE

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return 0 * self.gain

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": torch.tensor(0.0), "estimates": self.gain * batch["mixture"]}

    test_step = validation_step

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        assert batch["mixture"].shape[0] == output["estimates"].shape[0] == 1
        return {"mixture": batch["mixture"][0], "estimate1": output["estimates"][0]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader() -> DataLoader:
    return DataLoader(Sounds(), batch_size=3)


def events(root: Path) -> EventAccumulator:
    return EventAccumulator(str(root), size_guidance={"audio": 0, "images": 0}).Reload()


def board(root: Path) -> TensorBoardLogger:
    return TensorBoardLogger(save_dir=root, name="", version="", default_hp_metric=False)


def test_tensorboard(tmp_path: Path, tiny: Any) -> None:
    callback = AudioFigures(every_n_epochs=2, num_examples=2)
    trainer = tiny.make_trainer(tmp_path, [callback], logger=board(tmp_path), max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(Separator(gain=20.0), loader(), loader())
    tags = events(tmp_path).Tags()
    assert set(tags["audio"]) == {"0_mixture", "1_mixture", "0_estimate1", "1_estimate1_scaled"}  # 20 * 0.1 is too loud
    assert set(tags["images"]) == {"0_spectrograms", "1_spectrograms"}
    assert [event.step for event in events(tmp_path).Images("1_spectrograms")] == [2, 6]
    heard = events(tmp_path).Audio("1_mixture")
    assert [event.step for event in heard] == [2, 6]  # epochs 0 and 2
    assert heard[0].sample_rate == RATE


@pytest.mark.parametrize("case", ["no logger", "no figures", "no rate", "images only"])
def test_nothing_to_show_is_no_error(tmp_path: Path, tiny: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "no figures":
        monkeypatch.delattr(Separator, "figures")
    if case == "no rate":
        monkeypatch.setattr(Separator, "sample_rate", None)
    if case == "images only":
        monkeypatch.setattr(Separator, "figures", lambda *_: {"image": torch.zeros(3, 4, 5)})
    logger = False if case == "no logger" else board(tmp_path)
    trainer = tiny.make_trainer(tmp_path, [AudioFigures()], logger=logger, max_epochs=1)
    trainer.fit(Separator(), loader(), loader())
    assert case == "no logger" or not events(tmp_path).Tags()["audio"]
    if case != "no logger":
        trainer.test(trainer.lightning_module, loader(), verbose=False)
        assert not (tmp_path / "listen").exists()


def test_files_to_listen_to(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [AudioFigures(num_listen=4)])
    trainer.test(Separator(gain=5.0), loader(), verbose=False)
    names = {f"{i}_{tag}.wav" for i in range(4) for tag in ("mixture", "estimate1")}
    assert {file.name for file in (tmp_path / "listen").iterdir()} == names
    samples, rate = soundfile.read(tmp_path / "listen" / "3_estimate1.wav")
    assert rate == RATE and len(samples) == 1000 and samples[0] == pytest.approx(1.5)  # above 1, as it is


def test_the_same_examples_every_time(tmp_path: Path, tiny: Any) -> None:
    """Whatever was drawn at random before: the first validation items, in their order."""
    for part in ("one", "two"):
        trainer = tiny.make_trainer(tmp_path / part, [AudioFigures()], logger=board(tmp_path / part), max_epochs=1)
        torch.manual_seed(len(part) + ord(part[0]))
        trainer.fit(Separator(), loader(), loader())
    pictures = [events(tmp_path / part).Images("1_spectrograms")[0] for part in ("one", "two")]
    assert pictures[0].encoded_image_string == pictures[1].encoded_image_string


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        AudioFigures(every_n_epochs=0)
