"""A gradient that is not finite changes nothing, on no process, and too many in a row end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.dbc import DBC
from callbacks.ema import EMA
from callbacks.not_finite import SkipNotFinite, all_finite
from models.base import System
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*`configure_optimizers` returned `None`"),
]


class Net(pl.LightningModule):
    """*bad*: batches (counted over epochs) whose *what* is not finite; on process *rank* only, if one is given."""

    def __init__(self, *, bad: tuple[int, ...] = (), what: str = "loss", rank: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.bad, self.what, self.rank, self.batches = bad, what, rank, 0
        self.history: list[list[Tensor]] = []  # all that a step may change, before each batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        momentum = [state["momentum_buffer"] for state in self.optimizers().optimizer.state.values()]
        self.history.append([tensor.clone() for tensor in (*self.state_dict().values(), *momentum)])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        bad = self.batches in self.bad and self.rank in (None, self.global_rank)
        self.batches += 1
        x = batch["x"] * (torch.nan if bad and self.what == "input" else 1.0)
        loss = self.body(x).square().mean()
        if bad and self.what == "gradient":
            loss.register_hook(lambda grad: grad * torch.inf)
        return loss * (torch.nan if bad and self.what == "loss" else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(folder: Path, tiny: Any, callback: SkipNotFinite, net: Net, **options: Any) -> pl.Trainer:
    items = [{"x": torch.tensor([float(i)]), "name": f"n{i}"} for i in range(12)]
    path = options.pop("ckpt_path", None)
    trainer = tiny.make_trainer(folder, [callback], **{"max_epochs": 1, **options})
    trainer.fit(net, DataLoader(items, batch_size=2), ckpt_path=path, weights_only=True)
    return trainer


def changed(net: Net) -> list[bool]:
    """Of each batch but the last, whether anything but the count of batch norm's batches is other after it."""
    kept = [[tensor for tensor in state if tensor.is_floating_point()] for state in net.history]
    return [
        any(not torch.equal(a, b) for a, b in zip(x, y, strict=False)) for x, y in zip(kept, kept[1:], strict=False)
    ]


def sound(net: Net) -> bool:
    return all_finite([tensor for tensor in net.state_dict().values() if tensor.is_floating_point()])


@pytest.mark.parametrize("what", ["loss", "gradient", "input"])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    callback, net = SkipNotFinite(), Net(bad=(2,), what=what)
    trainer = fit(tmp_path, tiny, callback, net)
    assert changed(net) == [True, True, False, True, True]
    assert trainer.global_step == 6 and sound(net)
    assert callback.summary() == {"skipped_steps": 1}
    named = "loss" if what != "gradient" else "gradient"
    assert f"step 3 is left out, its {named} is not finite (n4, n5)" in caplog.text


def test_without_it_all_is_lost(tmp_path: Path, tiny: Any) -> None:
    callback, net = SkipNotFinite(max_in_a_row=100), Net(bad=(2,))
    callback.on_before_optimizer_step = lambda *_: None  # type: ignore[method-assign]
    fit(tmp_path, tiny, callback, net)
    assert not sound(net)


def test_of_accumulated_batches_all_are_left_out(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback, net = SkipNotFinite(), Net(bad=(3,), what="input")
    trainer = fit(tmp_path, tiny, callback, net, accumulate_grad_batches=2)
    assert trainer.global_step == 3 and callback.skipped == 1 and sound(net)
    assert "step 2 is left out, its loss is not finite (n6, n7)" in caplog.text


def test_too_many_in_a_row_end_the_run(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(RuntimeError) as error:
        fit(tmp_path, tiny, SkipNotFinite(max_in_a_row=2), Net(bad=(0, 2, 3)))
    assert "not finite in 2 steps in a row, the last is 4" in str(error.value)
    assert "look at these examples: n4, n5, n6, n7" in str(error.value) and "\n" not in str(error.value)
    callback = SkipNotFinite(max_in_a_row=2)
    fit(tmp_path, tiny, callback, Net(bad=(0, 2, 4)))
    assert callback.skipped == 3


def test_a_resumed_run_goes_on_counting(tmp_path: Path, tiny: Any) -> None:
    trainer = fit(tmp_path, tiny, SkipNotFinite(max_in_a_row=3), Net(bad=(4, 5)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    callback = SkipNotFinite(max_in_a_row=3)
    with pytest.raises(RuntimeError, match="in 3 steps in a row, the last is 7"):
        fit(tmp_path, tiny, callback, Net(bad=(0,)), ckpt_path=tmp_path / "x.ckpt", max_epochs=2)
    assert callback.skipped == 3


def test_the_loss_scaler_is_left_to_find_its_scale(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Overflows of a scale that is too large are no matter; a loss that is not finite is."""

    def scaled() -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000))

    callback, net = SkipNotFinite(max_in_a_row=1), Net()
    fit(tmp_path, tiny, callback, net, plugins=scaled())
    assert callback.skipped == 0
    for weight, fresh in zip(net.parameters(), Net().parameters(), strict=True):
        assert torch.equal(weight, fresh), "every step overflows"
    with pytest.raises(RuntimeError, match="look at these examples: n2, n3$"):
        fit(tmp_path, tiny, SkipNotFinite(max_in_a_row=1), Net(bad=(1,)), plugins=scaled())


@pytest.mark.parametrize("max_in_a_row", [1, 2])
def test_all_processes_leave_the_step_out(tmp_path: Path, tiny: Any, max_in_a_row: int) -> None:
    net, callback = Net(bad=(1,), rank=1), SkipNotFinite(max_in_a_row=max_in_a_row)
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True}
    if max_in_a_row == 1:
        with pytest.raises(Exception, match=r"look at these examples: n\d+, n\d+\n"):
            fit(tmp_path, tiny, callback, net, **options)
        return
    fit(tmp_path, tiny, callback, net, **options)
    assert sound(net)  # of process 0, which had no bad batch


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "many"])
def test_wrong_values_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_in_a_row"):
        SkipNotFinite(max_in_a_row=wrong)


def test_all_finite() -> None:
    fine = [torch.ones(3), torch.full((2,), 6e4, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)]
    assert all_finite(fine) and all_finite([])
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*fine, torch.tensor([0.0, wrong])])
    assert not all_finite([torch.sparse_coo_tensor([[1]], [torch.nan], (4,))])


def test_averages_and_compression_leave_it_out_too(tmp_path: Path, tiny: Any) -> None:
    """One that comes before it in the list, and would work on the gradients."""
    seen = []

    class Edits(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append([p.grad is None for p in pl_module.parameters()])

    torch.manual_seed(1)
    ema, net = EMA(warmup=False, decay=0.5), Net(bad=(2,))
    trainer = tiny.make_trainer(tmp_path, [Edits(), ema, SkipNotFinite()], max_steps=3, gradient_clip_val=1.0)
    kept = []
    net.on_train_batch_end = lambda *_: kept.append(net.body[0].weight.detach().clone())  # type: ignore[method-assign]
    first = net.body[0].weight.detach().clone()
    items = [{"x": torch.tensor([float(i)]), "name": f"n{i}"} for i in range(6)]
    trainer.fit(net, DataLoader(items, batch_size=2))
    assert seen == [[False] * 6, [False] * 6, [True] * 6]
    assert ema.num_updates == 2 and torch.equal(kept[1], kept[2])
    torch.testing.assert_close(net.body[0].weight.detach(), 0.25 * first + 0.25 * kept[0] + 0.5 * kept[1])


def test_powersgd_forgets_it(tmp_path: Path, tiny: Any) -> None:
    """Its error feedback would make all later gradients NaN, and end the run."""

    class Wide(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.body = nn.Sequential(nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 1))

    net, callback = Wide(bad=(3,), rank=1), SkipNotFinite(max_in_a_row=2)
    dbc = DBC(method=None, comm="powersgd", powersgd_rank=1, powersgd_start_step=2)
    trainer = tiny.make_trainer(
        tmp_path, [dbc, callback], devices=2, strategy="ddp_fork", use_distributed_sampler=True, max_epochs=3
    )
    items = [{"x": torch.tensor([float(i) / 12]), "name": f"n{i}"} for i in range(12)]
    before = net.body[1].weight.detach().clone()
    trainer.fit(net, DataLoader(items, batch_size=2))
    assert sound(net) and not torch.equal(net.body[1].weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["conv_tasnet", "deepvqe", "nest", "unet"])
def test_every_system(
    system: str, script: Any, corpus: Path, photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is left out and changes nothing; where no other comes, the run fails and names what it saw."""
    folder, tiny = (photos, TINY_UNET) if system == "unet" else (corpus, {"deepvqe": TINY_ECHO}.get(system, TINY))
    key, names = "data.{}_manifest", ("train", "val")
    if system == "nest":
        tiny, key, names = TINY_NEST, "model.{}_ds.manifest_filepath", ("train", "validation")
    given = [f"{key.format(name)}={folder / name[:5].replace('valid', 'val')}.jsonl" for name in names]
    command = [f"model={system}", *tiny, *given, "trainer.max_steps=4", "test=false", "exp_manager.version=x"]
    bad: list[int] = []
    changes: list[bool] = []
    step = System.training_step

    def poisoned(self: System, batch: Any, batch_idx: int) -> Tensor:
        changes.append(not all_finite([part for part in self.state_dict().values() if part.is_floating_point()]))
        return step(self, batch, batch_idx) * (torch.nan if self.global_step in bad else 1.0)

    monkeypatch.setattr(System, "training_step", poisoned)
    bad[:] = [1]
    done = script("train", [*command, "callbacks.not_finite.max_in_a_row=2"])
    assert done.code == 0 and done.out.count("step 2 is left out, its loss is not finite") == 1, done.text
    assert json.loads(next(in_tmp.rglob("summary.json")).read_text())["skipped_steps"] == 1
    assert not any(changes)

    bad[:] = range(1, 9)
    done = script("train", [*command, "exp_manager.version=y", "callbacks.not_finite.max_in_a_row=2"])
    assert done.code == 1 and "Traceback" not in done.text, done.text
    last = done.err.splitlines()[-1]
    assert last.startswith("failed: loss or gradient was not finite in 2 steps in a row, the last is 3"), done.text
    assert "examples without names" not in last
    summary = next(path for path in in_tmp.rglob("summary.json") if path.parent.name == "y")
    assert json.loads(summary.read_text())["status"] == "failed"
