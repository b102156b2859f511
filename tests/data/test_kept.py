"""Batches that stay on the device: loaded once, the same in each pass, up to the limit."""

import logging
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from data.bad_files import BadFiles, ResilientDataset
from data.base import SystemData
from data.kept import KeptBatches
from data.loader import make_loader
from data.sampler import EpochSampler, item_key


class Signals(Dataset):
    """Of 1 KiB; counts how often each is asked for."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> dict[str, Any]:
        index, epoch = item_key(key, self.size)
        self.asked.append(index)
        return {"signal": torch.full((256,), float(index)), "epoch": epoch, "name": str(index)}


def loader(limit_mb: int = 1, workers: int = 0, size: int = 10) -> tuple[Any, Signals]:
    signals = Signals(size)
    dataset = ResilientDataset(signals, BadFiles())
    dataset.kept = KeptBatches("val", torch.device("cpu"), limit_mb)
    sampler = EpochSampler(dataset, shuffle=False, drop_last=False, batch_size=4, fixed_epoch=0)
    made = make_loader(dataset, sampler=sampler, batch_size=4, num_workers=workers, collate_fn=dataset.collate)
    return made, signals


def indices(batches: Any) -> list[list[float]]:
    return [batch["signal"][:, 0].tolist() for batch in batches]


ALL = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0]]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaded_once(workers: int) -> None:
    made, signals = loader(workers=workers)
    first = list(made)
    first[0]["further"] = 1
    again = list(made)
    assert indices(first) == indices(again) == ALL and len(made) == 3
    assert again[0].keys() == {"signal", "epoch", "name"}, "what a step puts into its batch is gone"
    assert all(a["signal"].data_ptr() == b["signal"].data_ptr() for a, b in zip(first, again, strict=True))
    assert workers or signals.asked == list(range(10))


def test_a_pass_that_was_cut_short_goes_on_where_it_ended() -> None:
    made, signals = loader()
    for _, batch in zip(range(2), made, strict=False):
        assert batch
    assert len(made.dataset.kept) == 2
    assert indices(made) == indices(made) == ALL
    assert signals.asked == list(range(10))


def test_two_passes_at_a_time() -> None:
    made, signals = loader()
    one, other = iter(made), iter(made)
    seen = [next(one), next(other), next(one), *other, *one]
    assert [int(batch["signal"][0, 0]) for batch in seen] == [0, 0, 4, 4, 8, 8]
    assert indices(made) == ALL


def test_no_more_than_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    made, signals = loader(size=1500)  # 1.46 MiB
    with caplog.at_level(logging.INFO):
        passes = [indices(made) for _ in range(3)]
    assert passes[0] == passes[1] == passes[2] and sum(map(len, passes[0])) == 1500
    assert signals.asked == [*range(1500), *range(1016, 1500), *range(1016, 1500)]  # and an epoch of 8 bytes
    lines = [message for message in caplog.messages if "keep_on_device_mb" in message]
    assert lines == [
        "254 of the 375 batches of val stay on the device: data.loader.keep_on_device_mb=1 has no room for more"
    ]


def test_workers_get_none_of_them() -> None:
    made, _ = loader()
    assert list(made) and len(made.dataset.kept) == 3
    assert len(pickle.loads(pickle.dumps(made.dataset)).kept) == 0


class Data(SystemData):
    def __init__(self, **loader: Any) -> None:
        loader = {"num_workers": 0, **loader}
        super().__init__(train_manifest="not read", val_manifest="not read", batch_size=2, seed=3, loader=loader)
        self.made: dict[str, Signals] = {}

    def dataset(self, stage: str) -> Dataset:
        return self.made.setdefault(stage, Signals(8 if stage == "train" else 5))


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[str, list[float]]] = []

    def _look(self, stage: str, batch: Any) -> torch.Tensor:
        self.seen.append((stage, batch["signal"][:, 0].tolist()))
        return (self.weight * batch["signal"]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._look("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._look("val", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(keep: bool, **options: Any) -> tuple[Model, Data]:
    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    model, data = Model(), Data(keep_on_device=keep)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, use_distributed_sampler=False, **bare, **options)  # type: ignore[arg-type]
    trainer.fit(model, data)
    return model, data


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("options", [{}, {"overfit_batches": 2}, {"limit_val_batches": 2, "num_sanity_val_steps": 1}])
def test_the_same_training(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    plain, loaded = fit(False, **options)
    with caplog.at_level(logging.INFO, logger="data"):
        kept, asked = fit(True, **options)
    assert plain.seen == kept.seen and torch.equal(plain.weight, kept.weight)
    assert sorted(asked.made["val"].asked) == sorted(set(loaded.made["val"].asked)), "each once"
    overfits = "overfit_batches" in options
    assert len(asked.made["train"].asked) == (4 if overfits else 24)
    lines = [message for message in caplog.messages if "keep_on_device: not for training" in message]
    assert len(lines) == (0 if overfits else 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep_on_device": "gpu"}, "loader.keep_on_device must be true or false, got 'gpu'"),
        ({"keep_on_device_mb": 0}, "loader.keep_on_device_mb must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Data(**wrong)
