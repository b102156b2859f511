"""`loss.reduce: global`: a step is that of all its examples together, however they are spread."""

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.base import System

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
# How many of an example's frames count; no batch of two holds as many as another, and the third holds none.
COUNTS = (1, 4, 5, 3, 0, 0, 2, 0)
FRAMES = 5


class Examples(Dataset):
    def __init__(self, counts: tuple[int, ...] = COUNTS) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        signal = torch.randn(FRAMES, 3, generator=generator, dtype=torch.float64)
        return {"signal": signal, "selected": torch.arange(FRAMES) < self.counts[index]}


class Spread(torch.utils.data.Sampler):
    """Rank r of w takes the examples r, r + w, … in order; Lightning's own sampler would shuffle."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return iter(range(rank, self.length, torch.distributed.get_world_size() if distributed else 1))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Frames(System):
    """The mean error over the selected frames."""

    def __init__(self, *, reduce: str = "global", optim: dict[str, Any] | None = None) -> None:
        super().__init__(optim=optim or {"name": "sgd", "lr": 1.0})
        self.loss_reduce = reduce
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (self.layer(batch["signal"]).squeeze(-1) - 1).square()  # (B, frames)
        count = batch["selected"].sum()
        loss = error.masked_fill(~batch["selected"], 0.0).sum() / count.clamp_min(1)
        return {"loss": loss, "loss_count": count, "root": loss.detach().sqrt()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in self.parameters()]))  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def loader(batch_size: int, counts: tuple[int, ...] = COUNTS) -> DataLoader:
    examples = Examples(counts)
    return DataLoader(examples, batch_size=batch_size, sampler=Spread(len(examples)))


def make_trainer(*, accumulate: int = 1, devices: int = 1, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(
        **(defaults | options),
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def build(**arguments: Any) -> Frames:
    torch.manual_seed(0)
    return Frames(**arguments)


def trained(batch_size: int, *, counts: tuple[int, ...] = COUNTS, reduce: str = "global", **options: Any) -> Frames:
    system = build(reduce=reduce)
    make_trainer(**options).fit(system, loader(batch_size, counts))
    return system


def weights(system: Frames) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in system.parameters()])


def plain_gradients(step_size: int, counts: tuple[int, ...] = COUNTS, *, num_epochs: int = 1) -> list[Tensor]:
    """Of each step of so many examples, of the mean over their selected frames; without a Trainer."""
    system, found = build(), []
    for _ in range(num_epochs):
        for batch in DataLoader(Examples(counts), batch_size=step_size):
            gradients = torch.autograd.grad(system.step(batch)["loss"], list(system.parameters()))
            for parameter, gradient in zip(system.parameters(), gradients, strict=True):
                parameter.data -= gradient
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return found


def plain_gradient(counts: tuple[int, ...] = COUNTS) -> Tensor:
    return plain_gradients(len(counts), counts)[0]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 5)])
def test_a_step_is_that_of_one_batch_of_everything(batch_size: int, accumulate: int) -> None:
    """Also where the epoch ends in the middle of a window (3 batches of at most 3 examples of 5)."""
    system = trained(batch_size, accumulate=accumulate)
    (gradient,) = system.seen
    torch.testing.assert_close(gradient, plain_gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights(system), weights(build()) - gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("batch_size", "accumulate", "step_size"), [(4, 1, 4), (2, 2, 4), (3, 5, 8)])
def test_windows_do_not_leak_into_one_another(batch_size: int, accumulate: int, step_size: int) -> None:
    """A step's count is its own, after a window that was full and one that was cut short."""
    found = trained(batch_size, accumulate=accumulate, max_epochs=2).seen
    expected = plain_gradients(step_size, num_epochs=2)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-11, atol=1e-13)


def test_local_is_the_mean_of_the_means_of_micro_batches() -> None:
    (gradient,) = trained(4, accumulate=2, reduce="local").seen
    expected = (plain_gradient(COUNTS[:4]) + plain_gradient((0, 0, 0, 0, *COUNTS[4:]))) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient, plain_gradient(), rtol=1e-3)


def test_a_window_with_nothing_to_count_has_no_gradient() -> None:
    system = trained(2, counts=(0, 0, 0, 0, 2, 0, 0, 1), accumulate=2)
    assert torch.equal(system.seen[0], torch.zeros(4, dtype=torch.float64))
    assert system.seen[1].abs().min() > 0
    assert torch.isfinite(weights(system)).all()


def test_gradients_with_a_scaler_as_for_fp16() -> None:
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    system = trained(2, accumulate=4, plugins=[precision])
    torch.testing.assert_close(system.seen[0], plain_gradient(), rtol=1e-12, atol=1e-14)


def test_two_processes_are_one_with_all_examples() -> None:
    """Two micro-batches on each of two processes, then the validation."""
    found = []
    for devices, batch_size, accumulate in ((1, 8, 1), (2, 2, 2)):
        system = build()
        trainer = make_trainer(accumulate=accumulate, devices=devices)
        trainer.fit(system, loader(batch_size), loader(batch_size))
        found.append((weights(system), trainer.callback_metrics["val_loss"]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    assert found[1][1] == pytest.approx(float(found[0][1]), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_is_a_mean_over_everything(batch_size: int) -> None:
    system = build()
    trainer = make_trainer()
    (values,) = trainer.validate(system, loader(batch_size), verbose=False)
    everything = system.step(next(iter(DataLoader(Examples(), batch_size=8))))["loss"]
    assert values["val_loss"] == pytest.approx(everything.item(), rel=1e-6)
    assert set(values) == {"val_loss", "val_root"}
    (first,) = trainer.validate(system, loader(batch_size, COUNTS[:1]), verbose=False)
    alone = system.step(next(iter(DataLoader(Examples(COUNTS[:1])))))["loss"]
    assert first["val_loss"] == pytest.approx(alone.item(), rel=1e-6), "nothing is left from the validation before"
    (tested,) = trainer.test(system, loader(batch_size, (0, 0, 0, 0)), verbose=False)
    assert tested == {"test_loss": 0.0, "test_root": 0.0}


def test_the_training_loss_that_is_logged_is_the_batch_mean() -> None:
    system, logged, returned = build(), [], []

    class Watch(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            logged.append(float(trainer.callback_metrics["train_loss"]))
            returned.append(float(outputs["loss"]))

    make_trainer(accumulate=4, callbacks=[Watch()]).fit(system, loader(2))
    expected = [build().step(batch)["loss"].item() for batch in loader(2)]
    assert logged == pytest.approx(expected, rel=1e-6)
    assert returned == pytest.approx([loss / 4 for loss in expected], rel=1e-6), "as Lightning has it of every system"


def test_a_run_resumed_within_a_window_has_neither_gradients_nor_count(tmp_path: Path) -> None:
    """They are in no checkpoint, so that what is left of the window steps with its own mean."""

    class SaveAfterThree(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    trained(2, accumulate=4, callbacks=[SaveAfterThree()])
    system = build()
    make_trainer(accumulate=4).fit(system, loader(2), ckpt_path=tmp_path / "within.ckpt", weights_only=True)
    (gradient,) = system.seen  # of one batch: this loader knows no position, so it is the first
    torch.testing.assert_close(gradient, plain_gradient(COUNTS[:2]), rtol=1e-12, atol=1e-14)
