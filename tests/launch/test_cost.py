"""Multiply-adds and memory, counted by hand for networks that are small enough."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.cost import cost_of_training
from models.base import System

SGD = {"name": "sgd", "lr": 1.0}
BFLOAT16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


class Line(System):
    """One layer over frames of 8 samples, and one that is frozen."""

    sample_rate = 16

    def __init__(self, *, optim: dict[str, Any] | None = None) -> None:
        super().__init__(optim=optim)
        self.layer = nn.Linear(8, 32, bias=False)
        self.frozen = nn.Linear(32, 32, bias=False).requires_grad_(False)

    def forward(self, audio: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.layer(audio.unflatten(-1, (-1, 8)))))

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self(batch["audio"]).sum()}


class Picture(Line):
    sample_rate = None

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.layer(batch["image"]).sum()}


def test_multiply_adds_of_a_second_and_a_megapixel() -> None:
    found = cost_of_training(Line(optim=SGD), {"audio": torch.zeros(3, 80)})
    assert found[:2] == (2 * (8 * 32 + 32 * 32), "second of audio")  # two frames a second
    found = cost_of_training(Picture(optim=SGD), {"image": torch.zeros(2, 3, 1000, 8)})
    assert found.macs == pytest.approx(3 * 1000 * 8 * 32 / (1000 * 8 / 1e6)) and found.unit == "megapixel"


@pytest.mark.parametrize(
    ("optim", "states"),
    [
        ({"name": "adamw", "lr": 1.0}, 2),
        ({"name": "sgd", "lr": 1.0}, 0),
        ({"name": "sgd", "lr": 1.0, "momentum": 0.5}, 1),
    ],
    ids=str,
)
def test_memory_by_hand(optim: dict[str, Any], states: int) -> None:
    batch = {"audio": torch.zeros(5, 80), "name": ["x"] * 5}
    system, before = Line(optim=optim), torch.random.get_rng_state()
    found = cost_of_training(system, batch).memory
    assert found.weights == 4 * (8 * 32 + 32 * 32) and found.gradients == 4 * 8 * 32
    # The step counter of Adam is a number for the whole weight.
    assert found.optimizer == pytest.approx(states * found.gradients, rel=1e-3)
    assert found.activations == 4 * (5 * 80 + 5 * 10 * 32), "the layer's input and tanh's output"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_made_of_weights_alone_does_not_grow_with_the_batch() -> None:
    system = Line(optim=SGD).requires_grad_(True)
    half = [cost_of_training(system, {"audio": torch.zeros(n, 80)}, context=BFLOAT16).memory for n in (1, 3)]
    per_example = 2 * (80 + 10 * 32)  # the layer's input and tanh's output, in bfloat16
    assert half[1].activations - half[0].activations == 2 * per_example
    copies = half[0].activations - per_example
    assert copies == 2 * 32 * 32, "of the second weight, by which the gradient passes"


def test_autocast_halves_what_is_kept() -> None:
    system, batch = Line(optim=SGD).requires_grad_(True), {"audio": torch.zeros(50, 80)}
    half = cost_of_training(system, batch, context=BFLOAT16).memory.activations
    assert half < 0.75 * cost_of_training(system, batch).memory.activations
