"""A signal at any moment: the step is finished and saved, training stops, and a resume equals a run that went on."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import clock
from callbacks.graceful import GracefulStop, duration_s
from callbacks.last import LastCheckpoint
from callbacks.metrics_csv import MetricsCsv
from callbacks.resume import ExactResume
from callbacks.rng import RngState
from data.mixtures import SeparationData
from models.conv_tasnet import ConvTasNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]


class Kill(pl.Callback):
    """Sends this process a signal in the n-th call of a hook."""

    def __init__(self, hook: str, call: int = 1, signum: int = signal.SIGTERM, times: int = 1) -> None:
        self.calls = 0

        def kill(*_: Any, **__: Any) -> None:
            self.calls += 1
            if self.calls == call:
                for _ in range(times):
                    os.kill(os.getpid(), signum)

        setattr(self, hook, kill)


def last(root: Path) -> Path:
    return root / "checkpoints" / "last.ckpt"


def step_of(root: Path) -> int:
    return torch.load(last(root), weights_only=True)["global_step"]


LIMITS = {
    "epochs": dict(max_epochs=2),
    "steps": dict(max_epochs=-1, max_steps=6),
    "accumulation": dict(max_epochs=2, accumulate_grad_batches=2),  # two steps an epoch
    "windows": dict(max_epochs=2, accumulate_grad_batches=2, val_check_interval=1),  # validation also within a step
}
WHOLE: dict[str, Any] = {}  # a run that is not stopped, per limit


def rows(table: Path) -> list[dict[str, str]]:
    """Of a metrics table; whether a resume adds the columns in another order does not matter."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("limit", "hook", "call", "saved_at"),
    [
        ("epochs", "setup", 1, 0),  # before the first step
        ("steps", "on_fit_start", 1, 0),
        ("epochs", "on_train_batch_start", 2, 2),  # within an epoch
        ("steps", "on_train_batch_end", 1, 1),
        ("epochs", "on_train_batch_start", 3, 3),  # in the last step of an epoch: its validation is still to come
        ("steps", "on_train_batch_end", 3, 3),
        ("epochs", "on_validation_start", 1, 3),
        ("epochs", "on_validation_batch_start", 1, 3),
        ("steps", "on_validation_batch_start", 2, 3),
        ("steps", "on_validation_epoch_end", 1, 3),  # the validation ends, the next epoch does not begin
        ("epochs", "on_validation_end", 1, 3),
        ("steps", "on_train_epoch_end", 1, 3),
        ("epochs", "on_train_epoch_end", 1, 3),
        ("accumulation", "on_train_batch_start", 1, 1),
        ("accumulation", "on_train_batch_start", 3, 2),
        ("accumulation", "on_validation_batch_start", 1, 2),
        ("windows", "on_train_batch_start", 1, 1),
        ("windows", "on_validation_batch_start", 1, 1),  # in the middle of a window: finished, and the window too
        ("windows", "on_validation_batch_start", 3, 1),
    ],
)
def test_stopped_and_resumed_equals_one_run(
    tmp_path: Path, tiny: Any, limit: str, hook: str, call: int, saved_at: int, capsys: pytest.CaptureFixture
) -> None:
    def run(folder: Path, *more: pl.Callback, checkpoint: Path | None = None) -> Any:
        torch.manual_seed(0 if checkpoint is None else 1)
        best = ModelCheckpoint(
            dirpath=folder / "checkpoints", monitor="val_loss", filename="best-{step}", enable_version_counter=False
        )
        stop_early = EarlyStopping(monitor="val_loss", patience=50)  # strict: fails when there is no val_loss
        graceful = GracefulStop()
        callbacks = [graceful, RngState(), LastCheckpoint(every_n_steps=500), ExactResume(), best, stop_early, *more]
        table = MetricsCsv(directory=folder)
        trainer = tiny.make_trainer(folder, callbacks, logger=table, **LIMITS[limit])
        module = tiny.Tiny(plateau=True)
        trainer.fit(module, datamodule=tiny.Data(), ckpt_path=checkpoint)
        return module, graceful, best, stop_early, table.path

    if limit not in WHOLE:
        WHOLE[limit] = run(tmp_path / "whole")
    whole, _, best, stop_early, table = WHOLE[limit]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    first, graceful, *_ = run(tmp_path, Kill(hook, call))
    assert graceful.stopped and graceful.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert step_of(tmp_path) == saved_at
    assert f"SIGTERM: saved checkpoints/last.ckpt at step {saved_at}\n" in capsys.readouterr().out

    done = list(first.events)
    if hook in ("on_validation_start", "on_validation_batch_start"):
        while done[-1][0] == "val":  # cut short, so it is repeated
            done.pop()
    second, _, best_again, stop_again, table_again = run(tmp_path, checkpoint=last(tmp_path))
    assert done + second.events == whole.events
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
    assert best_again.best_model_score == best.best_model_score
    assert Path(best_again.best_model_path).name == Path(best.best_model_path).name
    assert stop_again.state_dict() == stop_early.state_dict()
    assert rows(table_again) == rows(table)


def test_waits_for_accumulated_gradients(tmp_path: Path, tiny: Any) -> None:
    graceful = GracefulStop()
    trainer = tiny.make_trainer(
        tmp_path, [graceful, Kill("on_train_batch_end", 1)], accumulate_grad_batches=2, limit_val_batches=0
    )
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert graceful.stopped and step_of(tmp_path) == 1
    assert len([e for e in trainer.lightning_module.events if e[0] == "train"]) == 2


def test_asks_only_every_so_many_steps(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(
        tmp_path, [GracefulStop(every_n_steps=4), Kill("on_train_batch_end", 1)], max_epochs=-1, max_steps=9,
        limit_val_batches=0, limit_train_batches=20, val_check_interval=20, check_val_every_n_epoch=None,
    )  # fmt: skip
    data = tiny.Data()
    trainer.fit(tiny.Tiny(), datamodule=data)
    assert step_of(tmp_path) == 3  # the next epoch begins: all ranks ask there
    with pytest.raises(ValueError, match="every_n_steps=0"):
        GracefulStop(every_n_steps=0)


def test_stops_although_a_minimum_is_set(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [GracefulStop(), Kill("on_train_batch_end", 2)], min_steps=6, min_epochs=2)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert step_of(tmp_path) == 2
    assert not [event for event in trainer.lightning_module.events if event[0] == "val"]


def test_cut_validation_reports_nothing(tmp_path: Path, tiny: Any) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss", filename="best-{step}")
    trainer = tiny.make_trainer(tmp_path, [GracefulStop(), best, Kill("on_validation_batch_start", 1)])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert [e[0] for e in trainer.lightning_module.events] == ["train"] * 3 + ["val"]
    assert "val_loss" not in trainer.callback_metrics
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_nothing_is_saved_after_the_stop(tmp_path: Path, tiny: Any) -> None:
    class SavesAtTheEnd(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(last(tmp_path))
            trainer.save_checkpoint(tmp_path / "other.ckpt")

    trainer = tiny.make_trainer(tmp_path, [GracefulStop(), SavesAtTheEnd(), Kill("on_train_batch_start", 2)])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    batches = torch.load(last(tmp_path), weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert batches["current"]["ready"] == 2 and not (tmp_path / "other.ckpt").exists()
    trainer.save_checkpoint(tmp_path / "other.ckpt")  # after training it is the caller's again
    assert (tmp_path / "other.ckpt").exists()


def test_the_validation_of_the_very_last_step_is_finished(tmp_path: Path, tiny: Any) -> None:
    graceful = GracefulStop()
    trainer = tiny.make_trainer(tmp_path, [graceful, Kill("on_train_batch_end", 3)], max_epochs=-1, max_steps=3)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert graceful.signum == signal.SIGTERM and not graceful.stopped and step_of(tmp_path) == 3
    assert "val_loss" in trainer.callback_metrics


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_validation_batch_start"])
def test_in_the_sanity_check(tmp_path: Path, tiny: Any, hook: str) -> None:
    graceful = GracefulStop()
    trainer = tiny.make_trainer(tmp_path, [graceful, Kill(hook)], num_sanity_val_steps=2)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert graceful.stopped and step_of(tmp_path) == 0
    assert [e[0] for e in trainer.lightning_module.events] == ["val"]


def test_second_signal_stops_at_once(
    tmp_path: Path, tiny: Any, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.graceful._ECHO_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    graceful = GracefulStop()
    trainer = tiny.make_trainer(tmp_path, [graceful, Kill("on_train_batch_start", 2, signal.SIGINT, times=2)])
    try:
        with pytest.raises(SystemExit) as exit:
            trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
        assert exit.value.code == 1 and graceful.signum == signal.SIGINT and not graceful.stopped
        assert not last(tmp_path).exists()
        assert "SIGINT: stopping after this step; once more stops at once\n" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves Ctrl-C ignored


def test_the_same_signal_passed_on_by_a_launcher_is_one_request(tmp_path: Path, tiny: Any) -> None:
    trainer = tiny.make_trainer(tmp_path, [GracefulStop(), Kill("on_train_batch_start", 2, signal.SIGINT, times=2)])
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert step_of(tmp_path) == 2


def test_handlers_are_ours_while_training_and_gone_after_an_error(tmp_path: Path, tiny: Any) -> None:
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGUSR1", "SIGINT")}
    graceful = GracefulStop()
    seen = {}

    class Fails(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.update({name: signal.getsignal(getattr(signal, name)) for name in before})
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        tiny.make_trainer(tmp_path, [graceful, Fails()]).fit(tiny.Tiny(), datamodule=tiny.Data())
    assert set(seen.values()) == {graceful._note}
    assert {name: signal.getsignal(getattr(signal, name)) for name in before} == before


def test_signals_that_the_platform_lacks_are_left_out(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(signal, "SIGUSR1")
    trainer = tiny.make_trainer(tmp_path, [GracefulStop(), Kill("on_train_batch_end")])
    trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's own would miss it
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    assert step_of(tmp_path) == 1


def test_after_training_the_callers_handlers_are_at_work(tmp_path: Path, tiny: Any) -> None:
    """In a test nothing is left to save; Lightning's own handler does not stand in front of the caller's."""

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        trainer = tiny.make_trainer(tmp_path, [GracefulStop(), Kill("on_test_batch_start")], max_steps=1)
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
        assert signal.getsignal(signal.SIGTERM) is leave
        with pytest.raises(SystemExit) as stop:
            trainer.test(trainer.lightning_module, datamodule=tiny.Data(), verbose=False)
        assert stop.value.code == 143 and not trainer.received_sigterm
    finally:
        signal.signal(signal.SIGTERM, before)


def test_saves_after_all_other_callbacks(tmp_path: Path, tiny: Any) -> None:
    best = ModelCheckpoint(dirpath=tmp_path)
    graceful, other = GracefulStop(), Kill("on_fit_end", call=99)
    trainer = tiny.make_trainer(tmp_path, [graceful, other, best], max_steps=1)
    trainer.fit(tiny.Tiny(), datamodule=tiny.Data())
    order = trainer.callbacks
    assert order.index(other) < order.index(graceful) < order.index(best)


def test_separator_stopped_within_a_window(tmp_path: Path, tiny: Any, corpus: Path) -> None:
    """Seven batches an epoch, four to a step; loader workers, augmentation and a schedule that reduces."""

    def run(folder: Path, *more: pl.Callback) -> pl.Trainer:
        pl.seed_everything(1 if last(folder).exists() else 0, verbose=False)
        data = SeparationData(
            train_manifest=str(corpus / "train.jsonl"),
            val_manifest=str(corpus / "val.jsonl"),
            batch_size=1,
            train_mixtures=7,
            val_mixtures=2,
            segment_s=0.2,
            eval_segment_s=0.3,
            speed=[0.9, 1.0],
            loader={"num_workers": 2},
        )
        sched = {"name": "halving", "monitor": "val_loss", "mode": "max", "patience": 0}
        system = ConvTasNet(
            num_filters=8, bottleneck_channels=4, hidden_channels=8, skip_channels=4, num_blocks=2, num_repeats=1,
            optim={"name": "adam", "lr": 0.01, "sched": sched},
        )  # fmt: skip
        callbacks = [ExactResume(), RngState(), GracefulStop(), LastCheckpoint(every_n_steps=1), *more]
        trainer = tiny.make_trainer(folder, callbacks, max_epochs=3, accumulate_grad_batches=4)
        trainer.fit(system, datamodule=data, ckpt_path=last(folder) if last(folder).exists() else None)
        return trainer

    def rate(trainer: pl.Trainer) -> float:
        return trainer.optimizers[0].param_groups[0]["lr"]

    whole = run(tmp_path / "whole")
    assert rate(whole) < 0.01
    stopped = tmp_path / "stopped"
    assert run(stopped, Kill("on_train_batch_start", 2)).global_step == step_of(stopped) == 1
    # Two batches on, in the second window, which the epoch's end cuts after three.
    assert run(stopped, Kill("on_train_batch_end", 2)).global_step == step_of(stopped) == 2
    resumed = run(stopped)
    assert (resumed.global_step, rate(resumed)) == (6, rate(whole))
    for mine, theirs in zip(resumed.lightning_module.parameters(), whole.lightning_module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert str(resumed.optimizers[0].state_dict()) == str(whole.optimizers[0].state_dict())


def test_durations() -> None:
    assert duration_s("00:00:00:01") == 1
    assert duration_s("1:02:03:04") == ((24 + 2) * 60 + 3) * 60 + 4
    for wrong in ("", "5", "01:00", "00:01:00", "00:00:00:00", "00:00:60:00", "00:24:00:00", "a:b:c:d", 5, None):
        with pytest.raises(ValueError, match="DD:HH:MM:SS"):
            duration_s(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^max_time: give days"):
        GracefulStop(max_time="soon")


def test_the_end_of_its_time_is_no_signal(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved at the step, stopped, and the run that goes on has its whole time again."""
    for expected in (2, 4, 6):
        stop = GracefulStop(max_time="00:00:01:00")
        callbacks = [stop, RngState(), ExactResume(), LastCheckpoint()]
        trainer = tiny.make_trainer(tmp_path, callbacks, max_steps=6, max_epochs=-1)
        monkeypatch.setattr(clock, "wall_seconds", lambda t=trainer, e=expected: 60.0 * (t.global_step >= e))
        trainer.fit(tiny.Tiny(), datamodule=tiny.Data(), ckpt_path=last(tmp_path) if last(tmp_path).exists() else None)
        assert trainer.global_step == step_of(tmp_path) == expected
        assert (stop.signum, stop.stopped) == (0, expected < 6)
