"""When `switch_epoch: auto` switches: once the spectra have come to rest, and there is something to gain."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from callbacks.low_rank import LowRank
from callbacks.metrics_csv import MetricsCsv
from modules.low_rank import LowRankLayer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


class Sorted(pl.LightningModule):
    """A random weight that never learns; at one step it becomes one of rank 3 all the same."""

    def __init__(self, *, at_step: int) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(32, 48), nn.Linear(48, 24)
        self.at_step, self.lr = at_step, 0.0

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.other(self.layer(batch["x"].repeat(1, 16))).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.at_step:
            with torch.no_grad():
                self.layer.weight.copy_(torch.randn(48, 3) @ torch.randn(3, 32))
        return self.step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_waits_until_a_layer_has_a_rank_that_pays(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    system, callback = Sorted(at_step=5), LowRank(window=2, watch_every_n_steps=1, min_speedup=0.0)
    with caplog.at_level(logging.INFO, "low_rank"):
        tiny.make_trainer(tmp_path, [callback], max_epochs=4).fit(system, datamodule=tiny.Data(validation=False))
    waited = [text for text in caplog.messages if text.startswith("no layer may switch to low rank yet")]
    assert len(waited) == 8, "at rest before the steps 1 to 5; for the other layer once more, from 9 to 11"
    assert "the nearest: layer: dense: its spectrum is as flat as that of noise" in waited[0]
    # Before step 6 the spectrum has just moved; before step 7 it is at rest, as another one.
    assert [switch["step"] for switch in callback.summary()["low_rank"]] == [7]
    assert isinstance(system.layer, LowRankLayer) and system.layer.rank in (2, 3, 4)
    assert type(system.other) is nn.Linear and "other: dense: its spectrum is as flat" in caplog.text


def test_layers_switch_each_when_it_is_ready(tmp_path: Path, tiny: Any) -> None:
    class Both(Sorted):
        """And the other, later."""

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 6:
                with torch.no_grad():
                    self.other.weight.copy_(torch.randn(24, 3) @ torch.randn(3, 48))
            return super().training_step(batch, batch_idx)

    callback = LowRank(window=3, watch_every_n_steps=1, min_speedup=0.0, lr_factor=0.5)
    system = Both(at_step=0)
    system.lr = 1e-30
    trainer = tiny.make_trainer(tmp_path, [callback], max_epochs=5)
    trainer.fit(system, datamodule=tiny.Data(validation=False))
    switches = [(switch["step"], list(switch["layers"])) for switch in callback.summary()["low_rank"]]
    assert switches == [(3, ["layer"]), (9, ["other"])], "of equal ranks are the observations 1 to 3, and 7 to 9"
    assert isinstance(system.layer, LowRankLayer) and isinstance(system.other, LowRankLayer)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 5e-31, "halved at the first alone"


def test_what_a_switch_changed_is_logged(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Timed(Sorted):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.log("step_s", 0.25 if self.global_step < 4 else 0.125)
            self.log("train_loss", 3.0 - self.global_step)
            return super().training_step(batch, batch_idx)

    callback = LowRank(switch_step=4, rank_by="ratio", ratio=0.25, min_speedup=0.0, min_energy=0.0)
    trainer = tiny.make_trainer(tmp_path, [callback], logger=MetricsCsv(directory=tmp_path))
    with caplog.at_level(logging.INFO, "low_rank"):
        trainer.fit(Timed(at_step=-1), datamodule=tiny.Data(validation=False))
    logged = {}
    for row in csv.DictReader((tmp_path / "metrics.csv").open()):
        logged |= {name: (int(row["step"]), float(value)) for name, value in row.items() if value and "rank" in name}
    # Weights of (48, 32) at rank 8 and (24, 48) at rank 6; batches of two.
    assert logged == {
        "low_rank_layers": (4, 2.0),
        "low_rank_parameters_before": (4, 48 * 32 + 24 * 48 + 72),
        "low_rank_parameters_after": (4, 8 * (48 + 32) + 6 * (24 + 48) + 72),
        "low_rank_flops_before": (4, 2 * 2 * (48 * 32 + 24 * 48)),
        "low_rank_flops_after": (4, 2 * 2 * (8 * (48 + 32) + 6 * (24 + 48))),
        "low_rank_metric_before": (5, 0.0),
        "low_rank_metric_after": (5, -2.0),
        "low_rank_step_s_before": (5, 0.25),
        "low_rank_step_s_after": (5, 0.125),
    }
    assert "train_loss before the switch 0, after it -2" in caplog.text
    assert "seconds of a step before the switch 0.25, after it 0.125" in caplog.text


def test_a_training_in_which_none_is_ready_says_why_of_each(
    tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    system, callback = Sorted(at_step=-1), LowRank(window=2, min_speedup=0.0, include=["layer"])
    with caplog.at_level(logging.INFO, "low_rank"):
        tiny.make_trainer(tmp_path, [callback], max_epochs=3).fit(system, datamodule=tiny.Data(validation=False))
    assert "training ended before layers switched to low rank (epoch 3, 2 observations)" in caplog.text
    assert "  layer: dense: its spectrum is as flat as that of noise" in caplog.text
    assert "  other: dense: not included" in caplog.text
    assert callback.summary() == {"low_rank": []} and not isinstance(system.layer, LowRankLayer)


def test_a_time_that_was_asked_for_does_not_wait(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = LowRank(switch_step=2, min_speedup=0.0)
    with caplog.at_level(logging.INFO, "low_rank"):
        tiny.make_trainer(tmp_path, [callback]).fit(Sorted(at_step=4), datamodule=tiny.Data(validation=False))
    assert caplog.text.count("no layer switches to low rank; the lines above say why of each") == 1
    assert [switch["layers"] for switch in callback.summary()["low_rank"]] == [{}]
