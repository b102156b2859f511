"""The average is the one of the formula, is what checkpoints and validations hold, and survives every resume."""

import copy
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn

from callbacks.ema import EMA, in_row_basis
from callbacks.graceful import GracefulStop
from callbacks.resume import ExactResume
from callbacks.rng import RngState
from launch.exp_manager import archive_writer
from modules.layer_switch import switch_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


class Weights(pl.Callback):
    """What the weight is after each optimiser step, and in each validation."""

    def __init__(self) -> None:
        self.live: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.first = pl_module.layer.weight.detach().clone()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.live):
            self.live.append(pl_module.layer.weight.detach().clone())

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated.append(pl_module.layer.weight.detach().clone())


class Everywhere(Checkpoint):
    """Saves in many hooks; being a checkpoint callback, it comes last in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[Path] = []

    def _save(self, trainer: pl.Trainer, place: str) -> None:
        path = self.folder / f"{len(self.saved):02d}-{place}-{trainer.global_step}.ckpt"
        self.saved.append(path)
        trainer.save_checkpoint(path)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validated")


def fit(tiny: Any, folder: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0 if ckpt_path is None else 1)
    trainer = tiny.make_trainer(folder, [*callbacks, ExactResume(), RngState()], **options)
    module = tiny.Tiny()
    trainer.fit(module, datamodule=tiny.Data(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize(
    ("options", "used_decays"),
    [
        (dict(decay=0.5, warmup=False), {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}),
        (dict(decay=0.25, warmup=True), {1: 0.1, 2: 2 / 11, 3: 0.25, 4: 0.25, 5: 0.25, 6: 0.25}),
        (dict(decay=0.5, warmup=False, every_n_steps=2), {2: 0.5, 4: 0.5, 6: 0.5}),
        (dict(decay=0.5, warmup=False, every_n_steps=2, start_step=3), {3: 0.0, 5: 0.5}),
    ],
    ids=["plain", "warm-up", "every second step", "from the third step"],
)
def test_is_the_average_of_the_formula(
    tmp_path: Path, tiny: Any, options: dict[str, Any], used_decays: dict[int, float]
) -> None:
    """The parameters are optimiser step -> the decay used there."""
    seen = Weights()
    module, trainer = fit(tiny, tmp_path, seen, EMA(**options))
    average = seen.first.double()
    for step, decay in used_decays.items():
        average = decay * average + (1 - decay) * seen.live[step - 1].double()
    assert len(seen.live) == 6
    assert not torch.allclose(average.float(), seen.live[-1])
    torch.testing.assert_close(module.layer.weight.detach(), average.float(), msg="the system holds it after training")


def test_counts_optimiser_steps_not_batches(tmp_path: Path, tiny: Any) -> None:
    ema = EMA()
    fit(tiny, tmp_path, ema, accumulate_grad_batches=3)
    assert ema.num_updates == 2


def test_validation_sees_the_average_if_it_is_to(tmp_path: Path, tiny: Any) -> None:
    plain, averaged, original = Weights(), Weights(), Weights()
    fit(tiny, tmp_path, plain)
    fit(tiny, tmp_path, averaged, EMA(decay=0.5))
    fit(tiny, tmp_path, original, EMA(decay=0.5, validate=False))
    assert all(torch.equal(a, b) for a, b in zip(averaged.live, plain.live, strict=True)), "training is not disturbed"
    assert all(torch.equal(a, b) for a, b in zip(original.validated, plain.validated, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(averaged.validated, plain.validated, strict=True))


def test_every_checkpoint_holds_the_average_and_resumes_bit_for_bit(tmp_path: Path, tiny: Any) -> None:
    """Also one that was written in a validation, while the system holds the average."""
    whole_ema, everywhere, seen = EMA(decay=0.9), Everywhere(tmp_path), Weights()
    whole, trainer = fit(tiny, tmp_path, whole_ema, seen, everywhere)
    live_at_the_end = torch.load(everywhere.saved[-1], weights_only=True)["callbacks"]["EMA"]["live"]
    tried = set()
    for path in everywhere.saved:
        place, step = path.stem.split("-")[1:]
        content = torch.load(path, weights_only=True)
        state = content["callbacks"]["EMA"]
        assert torch.equal(state["live"]["layer.weight"], seen.live[int(step) - 1] if step != "0" else seen.first), path
        assert step == "0" or not torch.equal(content["state_dict"]["layer.weight"], seen.live[int(step) - 1]), path
        if step not in ("2", "3") or int(step) == trainer.global_step or place in tried:
            continue
        tried.add(place)
        ema, again = EMA(decay=0.9), Everywhere(tmp_path / path.stem)
        resumed, _ = fit(tiny, tmp_path, ema, again, ckpt_path=path)
        assert torch.equal(resumed.layer.weight, whole.layer.weight), path
        last = torch.load(again.saved[-1], weights_only=True)
        assert all(torch.equal(last["callbacks"]["EMA"]["live"][n], w) for n, w in live_at_the_end.items()), path
        assert ema.num_updates == whole_ema.num_updates == 6
    assert tried == {"step", "validation", "validated", "epoch_start"}


def test_a_stop_in_a_validation_resumes_bit_for_bit(tmp_path: Path, tiny: Any) -> None:
    """The validation is cut short, and its end, where the live weights would come back, is never reached."""

    class Stop(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            graceful.signum = signal.SIGTERM

    whole, _ = fit(tiny, tmp_path, EMA(decay=0.9))
    graceful = GracefulStop()
    cut, trainer = fit(tiny, tmp_path, EMA(decay=0.9), Stop(), graceful)
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert graceful.stopped and trainer.global_step == tiny.num_batches
    assert torch.equal(cut.layer.weight, saved["state_dict"]["layer.weight"])
    assert not torch.equal(cut.layer.weight, saved["callbacks"]["EMA"]["live"]["layer.weight"])
    resumed, _ = fit(tiny, tmp_path, EMA(decay=0.9), ckpt_path=last)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_a_test_of_the_best_checkpoint_is_of_its_average(tmp_path: Path, tiny: Any) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss", save_top_k=1, every_n_epochs=1)
    module, trainer = fit(tiny, tmp_path, EMA(decay=0.5), best, max_epochs=3)
    content = torch.load(best.best_model_path, weights_only=True)
    other = {name: value + 1 for name, value in content["state_dict"].items()}
    torch.save(content | {"state_dict": other}, tmp_path / "other.ckpt")
    [expected] = trainer.test(module, datamodule=tiny.Data(), ckpt_path=best.best_model_path, verbose=False)
    assert torch.equal(module.layer.weight, content["state_dict"]["layer.weight"])
    fresh = tiny.Tiny()
    fresh.load_state_dict(content["state_dict"])
    alone = tiny.make_trainer(tmp_path, [])
    assert alone.test(fresh, datamodule=tiny.Data(), verbose=False)[0] == expected
    trainer.test(module, datamodule=tiny.Data(), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], other["layer.weight"]), "not the average of training"


def test_begins_with_the_weights_of_a_checkpoint_without_one(tmp_path: Path, tiny: Any) -> None:
    _, trainer = fit(tiny, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seen = Weights()
    seen.live = [torch.zeros(1)] * 3
    module, _ = fit(tiny, tmp_path, seen, EMA(decay=0.0, warmup=False), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(seen.first, trainer.lightning_module.layer.weight)
    assert torch.equal(module.layer.weight, seen.live[-1]), "a decay of 0 keeps nothing"


def test_a_damaged_state_is_named(tmp_path: Path, tiny: Any) -> None:
    _, trainer = fit(tiny, tmp_path, EMA(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["callbacks"]["EMA"]["live"]["layer.weight"] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no average of layer.weight, or one of another shape"):
        fit(tiny, tmp_path, EMA(), ckpt_path=tmp_path / "x.ckpt")


# Precision and names


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.wide = nn.Linear(4, 4, dtype=torch.float64)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.alias = self.wide


class FakeStrategy:
    @staticmethod
    def broadcast(value: Any) -> Any:
        return value


class FakeTrainer:
    strategy = FakeStrategy()
    global_step = 0


def begun(model: nn.Module, **options: Any) -> EMA:
    ema = EMA(**options)
    ema.on_train_start(FakeTrainer(), model)  # type: ignore[arg-type]
    return ema


def state_with_average(ema: EMA, model: nn.Module) -> dict[str, Tensor]:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "callbacks": {}}
    ema.on_save_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    return checkpoint["state_dict"]


def test_keeps_what_narrow_weights_would_round_away() -> None:
    model = Mixed()
    ema = begun(model, decay=0.999, warmup=False)
    before = model.narrow.weight.detach().clone()
    with torch.no_grad():
        model.narrow.weight.add_(0.25)
        model.wide.weight.add_(1e-12)
    for _ in range(20):
        ema._update(model)
    state = state_with_average(ema, model)
    moved = (state["narrow.weight"] - before.float()) / (model.narrow.weight - before).float()
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**20), rtol=1e-3, atol=0)
    assert state["wide.weight"].dtype == torch.float64 and state["alias.weight"] is not model.alias.weight
    assert torch.equal(state["alias.weight"], state["wide.weight"]), "all names of one weight"
    assert not torch.equal(state["wide.weight"], model.wide.weight)
    assert torch.equal(state["frozen.weight"], model.frozen.weight)
    assert set(ema._average) == {
        f"{layer}.{kind}" for layer in ("narrow", "wide", "alias", "norm") for kind in ("weight", "bias")
    }, "no buffers, nothing frozen"


def test_exchanges_values_and_keeps_parameters() -> None:
    model = nn.Linear(3, 3)
    ema = begun(model)
    weight, before = model.weight, model.weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    live = weight.detach().clone()
    with ema.weights_in(model), ema.weights_in(model):
        assert torch.equal(model.weight, before)
    assert model.weight is weight and torch.equal(weight, live)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(decay=1.0), "decay=1.0: give at least 0 and less than 1"),
        (dict(every_n_steps=0), "every_n_steps=0: give at least 1"),
        (dict(start_step=-1), "start_step=-1: give at least 0"),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**wrong)


# Layers that switch


def switch(model: nn.Module, ema: EMA, name: str, rank: int) -> None:
    replaced, _ = switch_layers(model, {name: rank})
    ema.layers_replaced(FakeTrainer(), model, replaced)  # type: ignore[arg-type]


def drift(model: nn.Module, ema: EMA) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        ema._update(model)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(4, 5, 3)], ids=["linear", "convolution"])
def test_follows_a_switch_and_the_next(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(copy.deepcopy(layer).double())
    ema = begun(model, decay=0.9, warmup=False)
    drift(model, ema)
    dense = state_with_average(ema, model)
    expected = dense["0.weight"].flatten(1)
    for rank in (5, 2):
        switch(model, ema, "0", rank)
        state, v = state_with_average(ema, model), model[0].v.detach()
        torch.testing.assert_close(state["0.u"], expected @ v.mT @ torch.linalg.inv(v @ v.mT))
        torch.testing.assert_close(state["0.v"], v)
        if rank == 5:
            assert torch.equal(state["0.bias"], dense["0.bias"])
        assert set(ema._average) == {"0.u", "0.v", "0.bias"}
        drift(model, ema)
        state = state_with_average(ema, model)
        assert not torch.equal(state["0.v"], model[0].v), "they go on from one value, not as one"
        expected = state["0.u"] @ state["0.v"]


def test_follows_under_each_name_of_a_shared_layer() -> None:
    model: Any = nn.Module()
    model.first = model.second = nn.Sequential(nn.Linear(4, 4))
    ema = begun(model)
    switch(model, ema, "first.0", 2)
    assert set(ema._average) == {f"{name}.0.{key}" for name in ("first", "second") for key in ("u", "v", "bias")}
    drift(model, ema)


def test_does_not_follow_what_it_does_not_average() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ema = EMA(start_step=100)
    switch(model, ema, "0", 2)
    assert not ema._average


def test_factors_of_a_weight_without_full_rank() -> None:
    """v vᵀ is singular: least squares still give the nearest product."""
    weight = torch.randn(5, 6, dtype=torch.float64)
    v = torch.randn(2, 6, dtype=torch.float64)
    v = torch.cat([v, torch.zeros(1, 6, dtype=torch.float64)])
    u = in_row_basis(weight, v)
    projector = torch.linalg.pinv(v) @ v
    torch.testing.assert_close(u @ v, weight @ projector)
    assert torch.isfinite(u).all()


def test_an_archive_beside_a_checkpoint_holds_the_average(tmp_path: Path) -> None:
    class Archived(nn.Linear):
        trainer: Any = None

        def save_to(self, path: Path) -> None:
            torch.save(self.state_dict(), path)

    model = Archived(2, 2)
    ema = begun(model)
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    live = model.weight.detach().clone()
    config = {"exp_manager": {"checkpoint_callback_params": {"always_save_nemo": True}}}
    save = archive_writer(config, model)  # type: ignore[arg-type]
    assert save is not None
    for callbacks, expected in (([ema], average), ([], live)):
        model.trainer = SimpleNamespace(callbacks=callbacks)
        save(tmp_path / "x.nemo")
        assert torch.equal(torch.load(tmp_path / "x.nemo", weights_only=True)["weight"], expected)
    assert torch.equal(model.weight, live)
