"""What the optimiser gets, what a resumed run continues with, what all processes agree on."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks import dbc
from callbacks.dbc import DBC
from callbacks.hook_clock import HookClock
from callbacks.plan import Plan
from callbacks.resume import ExactResume
from callbacks.rng import RngState
from modules.gradient_compression import compress

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
]
ROOT = Path(__file__).parent.parent.parent
SMALL = {"min_elements": 1, "every": 1}
WEIGHTS = ("a.weight", "b.weight", "c.weight")  # (12, 2), (16, 12), (16, 2, 6): the last two are of one shape


class Net(pl.LightningModule):
    def __init__(self, *, lr: float = 0.1, bad_step: int = -1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(2, 12), nn.Linear(12, 16), nn.Conv1d(2, 16, 6)
        self.lr, self.bad_step = lr, bad_step

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.a(batch["x"]) + torch.rand(12))
        loss = (self.b(hidden) + self.c(hidden.view(-1, 2, 6)).flatten(1)).square().mean()
        return loss * (torch.nan if self.global_step == self.bad_step else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Spy(pl.Callback):
    """Keeps the gradients of each step as they are where this callback stands in the list."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.seen.append(grads)


def fit(folder: Path, tiny: Any, callbacks: list[pl.Callback], net: Net | None = None, **options: Any) -> Net:
    net, path = net or Net(), options.pop("ckpt_path", None)
    trainer = tiny.make_trainer(folder, callbacks, **{"max_epochs": 1, **options})
    trainer.fit(net, datamodule=tiny.Data(validation=False), ckpt_path=path, weights_only=True)
    return net


def test_the_optimiser_gets_the_compressed_gradient_and_clips_it(tmp_path: Path, tiny: Any) -> None:
    """Of the accumulated one, once per step; biases and what is left out stay."""
    before, after, net = Spy(), Spy(), Net(lr=1.0)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    callback = DBC(**SMALL, method="svd", residual="damp", damp=0.2, exclude=["^c"])
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}
    fit(tmp_path, tiny, [before, callback, after], net, max_epochs=-1, max_steps=1, **options)
    (plain,), (changed,) = before.seen, after.seen
    for name, gradient in plain.items():
        if name in ("a.weight", "b.weight"):
            expected = compress(gradient[None], rank=1, generator=torch.Generator(), method="svd", damp=0.2)
            assert torch.allclose(changed[name], expected.gradient[0], atol=1e-7)
            assert not torch.equal(changed[name], gradient)
        else:
            assert torch.equal(changed[name], gradient)
    total = torch.stack([g.norm() for g in changed.values()]).norm()
    for name, parameter in net.named_parameters():
        assert total > 0.05
        assert torch.allclose(start[name] - parameter, changed[name] * 0.05 / total, atol=1e-6), name


class SaveAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop.epoch_loop._should_accumulate():
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "warm", "residual": "ef"},
        {"method": "rsvd", "residual": "ef", "energy": 0.6, "balance": 0.5, "every": 2},
    ],
    ids=["warm", "rsvd, every second step"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, tiny: Any, options: dict[str, Any]) -> None:
    def run(*more: pl.Callback, **where: Any) -> tuple[Net, DBC]:
        callback = DBC(**SMALL | options, ratio=0.2)
        net = fit(tmp_path, tiny, [callback, Plan(), ExactResume(), RngState(), *more], max_epochs=3, **where)
        return net, callback

    whole, first = run(SaveAt(4))  # in the middle of the second epoch
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]["DBC"]
    assert set(content["basis"]) == (set(WEIGHTS) if options["method"] == "warm" else set())
    assert set(content["error"]) == (set(WEIGHTS) if options["residual"] == "ef" else set())
    resumed, second = run(ckpt_path=tmp_path / "middle.ckpt")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    for store in ("error", "basis"):
        kept = second.state_dict()[store]
        assert all(torch.equal(value, kept[name]) for name, value in first.state_dict()[store].items())
    one, other = first.summary()["dbc"], second.summary()["dbc"]
    assert {**one, "share": 0} == {**other, "share": 0} and one["compressed_steps"] == (5 if "every" in options else 9)


def test_forgetting_the_state_would_show(tmp_path: Path, tiny: Any) -> None:
    """That the test above can fail."""
    options = {**SMALL, "residual": "ef", "ratio": 0.2}
    whole = fit(tmp_path, tiny, [DBC(**options), ExactResume(), RngState(), SaveAt(4)], max_epochs=2)
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    content["callbacks"]["DBC"]["error"] = {}
    torch.save(content, tmp_path / "middle.ckpt")
    callbacks = [DBC(**options), ExactResume(), RngState()]
    resumed = fit(tmp_path, tiny, callbacks, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    assert not torch.equal(whole.b.weight, resumed.b.weight)


def test_how_often_is_decided_once_and_kept(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """0.14 of a step: every fourth, from the ninth step on; a resumed run with a decision reads it and measures not."""

    def run(folder: Path, share: float, **where: Any) -> tuple[list[bool], DBC, Plan]:
        monkeypatch.setattr(HookClock, "take", lambda self: share)
        before, after, callback, plan = Spy(), Spy(), DBC(min_elements=1, every="auto"), Plan()
        callbacks = [before, callback, after, plan, SaveAt(4), ExactResume(), RngState()]
        with caplog.at_level(logging.INFO):
            fit(folder, tiny, callbacks, max_epochs=4, **where)
        changed = [not torch.equal(x["b.weight"], y["b.weight"]) for x, y in zip(before.seen, after.seen, strict=True)]
        return changed, callback, plan

    changed, callback, plan = run(tmp_path, 0.14)
    assert changed == 8 * [True] + [step % 4 == 0 for step in range(8, 12)]
    assert json.loads((tmp_path / "plan.json").read_text())["dbc_every"] == 4 == callback.summary()["dbc"]["every"]
    assert "dbc: every 4 step(s): it takes 14.0 % of a step, max_share=0.05" in caplog.text
    # Before the decision: it falls on the same step. After it: it is read.
    assert run(tmp_path / "b", 0.14, ckpt_path=tmp_path / "middle.ckpt")[0] == changed[4:]
    path = tmp_path / "later.ckpt"
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    content["plan"]["dbc_every"] = 4
    torch.save(content, path)
    assert run(tmp_path / "c", 0.9, ckpt_path=path)[0] == [step % 4 == 0 for step in range(4, 12)]


def test_auto_needs_the_plan(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(MisconfigurationException, match="callbacks.plan is needed"):
        fit(tmp_path, tiny, [DBC(min_elements=1)])


def test_what_is_not_finite_stays_so(tmp_path: Path, tiny: Any) -> None:
    spy, net = Spy(), Net(bad_step=2)
    callback = DBC(**SMALL, residual="ef")
    fit(tmp_path, tiny, [callback, spy], net)
    assert [bool(seen["b.weight"].isfinite().all()) for seen in spy.seen] == [True, True, False]
    assert callback.summary()["dbc"]["compressed_steps"] == 2
    assert all(error.isfinite().all() for error in callback.state_dict()["error"].values())


def test_logs_and_sums_up(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = DBC(**SMALL, include=["weight"], exclude=["^a"], method="svd", ratio=0.5)
    trainer = tiny.make_trainer(tmp_path, [callback], max_epochs=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(Net(), datamodule=tiny.Data(validation=False))
    assert "dbc: 2 weights of 1 shapes, 85 % of the parameters" in caplog.text
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0.5 < logged["dbc_energy"] <= 1 and 0 <= logged["dbc_error"] < 0.7 and 0 < logged["dbc_share"] < 1
    found = callback.summary()["dbc"]
    assert json.loads(json.dumps(found)) == found
    assert (found["matrices"], found["compressed_steps"], found["every"], found["method"]) == (2, 3, 1, "svd")
    assert 0 < found["share"] < 1 and found["capped_share"] == 0


def test_nothing_to_compress_is_said(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, tiny, [DBC(every=1)])
    assert "dbc: no weight has two axes, 4096 elements and a name that is included" in caplog.text


def test_state_of_replaced_layers_is_dropped(tmp_path: Path, tiny: Any) -> None:
    class Replace(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, system: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                old, new = system.b, nn.Linear(12, 16)
                system.b = new
                callback.layers_replaced(trainer, system, {"b": (old, new)})
                assert (
                    set(callback.state_dict()["error"])
                    == set(callback.state_dict()["basis"])
                    == {
                        "a.weight",
                        "c.weight",
                    }
                )

    callback, spy = DBC(**SMALL, residual="ef"), Spy()
    net = fit(tmp_path, tiny, [callback, Replace(), spy], Net(lr=0.0))
    gradient = spy.seen[2]["b.weight"]
    assert net.b.weight.grad is not None and torch.linalg.matrix_rank(gradient) == 1  # compressed from the new layer's
    assert set(callback.state_dict()["error"]) == set(WEIGHTS)


def test_the_yaml_has_every_argument_with_its_default() -> None:
    section = yaml.safe_load((ROOT / "config" / "callbacks" / "dbc.yaml").read_text())["dbc"]
    assert section.pop("_target_") == "callbacks.dbc.DBC"
    assert section == {name: p.default for name, p in inspect.signature(DBC).parameters.items()}


def test_presets_fill_what_is_not_given() -> None:
    def values(**options: Any) -> tuple:
        callback = DBC(**options)
        return callback.ratio, *(callback.options[key] for key in ("residual", "damp", "threshold"))

    assert values() == (0.1, "damp", 0.1, 1e-3)
    assert values(preset="conservative") == (0.15, "damp", 0.1, 1e-6)
    assert values(preset="balanced") == (0.1, "none", 0.1, 1e-6)
    assert values(preset="aggressive") == (0.08, "none", 0.1, 1e-5)
    assert values(preset="aggressive", ratio=0.2, residual="ef", balance=1.0, threshold=0.1) == (0.2, "ef", 0.1, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "bold"}, "preset=bold: choose one of conservative, balanced, aggressive, null"),
        ({"method": "qr"}, "method=qr: choose one of svd, rsvd, warm, guide, null"),
        ({"method": None}, "method=null: nothing to do without comm=powersgd"),
        ({"residual": "keep"}, "residual=keep: choose one of none, damp, ef, null"),
        ({"comm": "nccl"}, "comm=nccl: choose one of powersgd, null"),
        ({"ratio": 1.5}, "ratio=1.5: give above 0 and below 1"),
        ({"energy": 1.0}, "energy=1.0: give above 0 and below 1, or null"),
        ({"balance": -1}, "balance=-1: give 0 to 1"),
        ({"threshold": 0.0}, "threshold=0.0: give above 0"),
        ({"damp": 2}, "damp=2: give 0 to 1"),
        ({"every": 0}, "every=0: give a whole number from 1, or auto"),
        ({"every": "often"}, "every=often: give a whole number"),
        ({"max_share": 0}, "max_share=0: give above 0"),
        ({"powersgd_rank": 0}, "powersgd_rank=0: give 1 or more"),
        ({"powersgd_start_step": 1}, "powersgd_start_step=1: give 2 or more"),
        ({"include": ["("]}, r"include=\['\('\]: no regular expression"),
        ({"exclude": "weight"}, r"exclude=weight: give a list of regular expressions, \[weight\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DBC(**options)


def test_a_threshold_without_balance_is_said(caplog: pytest.LogCaptureFixture) -> None:
    DBC(threshold=1e-2)
    assert "threshold=0.01 has no effect without a balance" in caplog.text


def test_what_cannot_work_is_refused(tmp_path: Path, tiny: Any) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.a.parameters()), torch.optim.SGD(self.b.parameters())]

    with pytest.raises(
        MisconfigurationException, match="needs one optimiser and automatic optimisation: Two has 2 and steps by itself"
    ):
        fit(tmp_path, tiny, [DBC(**SMALL)], Two())

    class Fused(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    def scaled() -> dict[str, Any]:
        return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))}

    with pytest.raises(MisconfigurationException, match="residual=ef: a fused optimiser in 16-mixed"):
        fit(tmp_path, tiny, [DBC(**SMALL, residual="ef")], Fused(), **scaled())
    fit(tmp_path, tiny, [DBC(**SMALL, residual="damp")], Fused(), **scaled())
    fit(tmp_path, tiny, [DBC(**SMALL, residual="ef")], Net(), **scaled())


# Two processes


class Agree(pl.Callback):
    """Stands behind DBC: are gradients, and the parameters after all steps before, the same numbers on both?"""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        held = [p for p in pl_module.parameters() if p.grad is not None]
        own = torch.cat([part.detach().flatten() for p in held for part in (p, p.grad) if part is not None])
        both = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(both, own)
        pl_module.log("differing", (both[0] != both[1]).sum().float())
        pl_module.log("rank_of_b", float(torch.linalg.matrix_rank(pl_module.b.weight.grad)))  # type: ignore[union-attr]


class Apart(Net):
    """Each process has data of its own."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({"x": batch["x"] + self.global_rank}, batch_idx)


@pytest.mark.parametrize(
    ("options", "rank"),
    [({"method": "warm", "residual": "ef"}, 1), ({"method": None, "comm": "powersgd", "powersgd_rank": 2}, 2)],
    ids=["warm, ef", "powersgd"],
)
def test_two_processes_have_the_same_gradients(tmp_path: Path, tiny: Any, options: dict[str, Any], rank: int) -> None:
    callback = DBC(**SMALL, **options, powersgd_start_step=2)
    trainer = tiny.make_trainer(tmp_path, [callback, Agree()], devices=2, strategy="ddp_fork", max_epochs=2)
    trainer.fit(Apart(), datamodule=tiny.Data(validation=False))
    assert float(trainer.callback_metrics["differing"]) == 0
    assert float(trainer.callback_metrics["rank_of_b"]) == rank


class Halves(Net):
    """A batch of four rows, of which each of two processes has two."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(self.global_step))
        hidden = torch.tanh(self.a(rows[self.global_rank :: self.trainer.world_size]))
        return (self.b(hidden) + self.c(hidden.view(-1, 2, 6)).flatten(1)).square().mean()


@pytest.mark.parametrize("options", [{"method": "warm", "residual": "ef"}, {"method": "rsvd", "residual": "damp"}])
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, tiny: Any, options: dict[str, Any]) -> None:
    one = fit(tmp_path / "one", tiny, [DBC(**SMALL, **options)], Halves(), max_epochs=2)
    two = fit(tmp_path / "two", tiny, [DBC(**SMALL, **options)], Halves(), max_epochs=2, devices=2, strategy="ddp_fork")
    for (name, weight), other, fresh in zip(one.named_parameters(), two.parameters(), Net().parameters(), strict=True):
        assert not torch.equal(weight, fresh), name
        torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-6)


def test_powersgd_alone_is_said(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, tiny, [DBC(method=None, comm="powersgd"), SaveAt(2)])
        assert "comm=powersgd has no effect with one process" in caplog.text and "no checkpoint" not in caplog.text
        fit(tmp_path, tiny, [DBC(method=None, comm="powersgd")], max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    assert "the state of powersgd is not in checkpoints" in caplog.text


def test_the_guides_formulas_are_within_reach(tmp_path: Path, tiny: Any) -> None:
    before, after = Spy(), Spy()
    fit(tmp_path, tiny, [before, DBC(**SMALL, method="guide"), after], Net(lr=0.0), max_epochs=-1, max_steps=1)
    plain, changed = before.seen[0]["b.weight"], after.seen[0]["b.weight"]
    assert not torch.equal(plain, changed) and torch.equal(before.seen[0]["b.bias"], after.seen[0]["b.bias"])
    assert dbc.PRESETS.keys() == {"conservative", "balanced", "aggressive"}
