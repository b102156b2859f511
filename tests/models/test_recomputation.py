"""`gradient_checkpointing`: the same training, bit for bit, that keeps less; every system, its own data."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from launch.cost import cost_of_training
from models.base import System
from models.conv_tasnet import ConvTasNet
from modules.recomputation import recompute_in_training

SWITCH = "model.gradient_checkpointing=true"
# Random numbers in the parts and beside them, batch norm, and parts that are not there by default.
RANDOM = {
    "conv_tasnet": [],
    "deepvqe": [],
    "nest": ["model.encoder.dropout=0.2", "model.encoder.stochastic_depth_drop_prob=0.5"],
    "unet": ["model.dropout=0.3", "model.patch=2", "model.refine=2"],
}


def trained(build: Callable, typed: list[str]) -> tuple[System, list[Tensor]]:
    """The system, and each step's loss and the state of the random numbers behind it."""
    built, seen = build(*typed), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.extend((outputs["loss"].clone(), torch.get_rng_state()))

    torch.manual_seed(3)
    built.fit(max_steps=3, limit_val_batches=0, callbacks=[Watch()])
    return built.system, seen


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_training(built: Callable, tiny: dict[str, list[str]], name: str) -> None:
    typed = [*tiny[name], *RANDOM[name]]
    plain, expected = trained(built, typed)
    saving, found = trained(built, [*typed, SWITCH])
    assert len(found) == 6 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    states = plain.state_dict(), saving.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():  # batch norm's statistics and counters too
        assert torch.equal(states[1][key], value), key
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key


@pytest.mark.parametrize("name", RANDOM)
def test_less_is_kept(built: Callable, tiny: dict[str, list[str]], name: str) -> None:
    kept = []
    for more in ([], [SWITCH]):
        system, data, _ = built(*tiny[name], *more)
        data.setup("fit")
        system.recompute_activations()
        kept.append(cost_of_training(system, next(iter(data.train_dataloader()))).memory.activations)
    assert kept[1] < 0.8 * kept[0], kept


@pytest.mark.parametrize("name", RANDOM)
def test_all_parts_are_there(built: Callable, tiny: dict[str, list[str]], name: str) -> None:
    """A name with a mistake in it would be passed over."""
    more = ["model.depth=5"] if name == "unet" else []
    system = built(*tiny[name], *RANDOM[name], *more).system
    there = dict(system.named_modules())
    own = [part for part in system.checkpointed_parts if not part.startswith("network.network.")]
    assert own and not [part for part in own if part not in there]


class Counting(nn.Module):
    """Counts its forward passes, keeps running statistics, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.passes = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.passes += 1
        return self.dropout(self.norm(self.linear(x))) * scale


def test_two_passes_in_training_alone() -> None:
    torch.manual_seed(0)
    part, x = Counting(), torch.randn(8, 4)
    plain = copy.deepcopy(part)
    recompute_in_training([part])
    recompute_in_training([part])
    assert list(part.state_dict()) == list(plain.state_dict())
    gradients = []
    for module in (plain, part):
        torch.manual_seed(1)
        module(x, scale=2.0).square().sum().backward()  # no gradient for x is needed
        gradients.append(module.linear.weight.grad)
    assert torch.equal(*gradients)
    assert (plain.passes, part.passes) == (1, 2)
    assert part.norm.num_batches_tracked == 1 and torch.equal(part.norm.running_var, plain.norm.running_var)
    with torch.no_grad():
        part(x)
    part.eval()(x).sum().backward()
    assert part.passes == 4


def test_a_copy_stands_alone() -> None:
    part = Counting()
    recompute_in_training([part])
    other = copy.deepcopy(part)
    other(torch.ones(8, 4)).sum().backward()
    assert (part.passes, other.passes) == (0, 2)
    assert part.linear.weight.grad is None and other.linear.weight.grad is not None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"gradient_checkpointing": "yes"}, "model.gradient_checkpointing must be true or false, got 'yes'"),
        (
            {"gradient_checkpointing": True, "compile": "default"},
            "model.gradient_checkpointing=true beside model.compile=default: leave one of them out",
        ),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        ConvTasNet(**wrong)
    assert "\n" not in str(raised.value)


def test_a_system_that_names_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvTasNet, "checkpointed_parts", ())
    with pytest.raises(ValueError, match="ConvTasNet has no checkpointed_parts"):
        ConvTasNet(gradient_checkpointing=True)
