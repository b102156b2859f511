"""The rule with a clock of our own; real times are nowhere compared. And no trace is left."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from modules import layer_timing
from modules.layer_timing import Worth, fastest_ranks, recorded_inputs
from modules.low_rank import LowRankLayer


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every module that was timed; it takes a second for each weight, 1.5 for each of factors."""
    calls: list[nn.Module] = []

    def seconds(module: nn.Module, x: Tensor, context: object) -> float:
        calls.append(module)
        size = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
        return size * (1.5 if isinstance(module, LowRankLayer) else 1.0)

    monkeypatch.setattr(layer_timing, "_seconds", seconds)
    monkeypatch.setattr(layer_timing, "_SECONDS", 0.0)  # as few rounds as possible: their number is compared
    return calls


def inputs_of(layers: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    with recorded_inputs(layers) as seen, torch.no_grad():
        for layer in layers.values():
            layer(x)
    return seen


def test_the_largest_rank_that_is_faster_by_enough(timed: list[nn.Module]) -> None:
    layers = {"a": nn.Linear(40, 40)}
    inputs = inputs_of(layers, torch.randn(3, 40))
    for least, expected in [(1.0, 12), (1.1, 12), (1.2, 10), (1.6, 8), (3.0, 4), (7.0, 0), (6.0, 2)]:
        found = fastest_ranks(layers, inputs, min_speedup=least)["a"]
        assert found.max_rank == expected  # 1600 weights; 1.5 * 80 * rank
        assert found.speedups == {
            rank: round(1600 / (120 * rank), 3) for rank in range(18, 0, -2) if rank >= (expected or 1)
        }
    assert 20 not in found.speedups  # as many weights as the dense layer: needs no clock


def test_a_matrix_too_small_for_any_rank_is_not_timed(timed: list[nn.Module]) -> None:
    layers = {"a": nn.Linear(2, 2)}
    assert fastest_ranks(layers, inputs_of(layers, torch.randn(3, 2)), min_speedup=1.2)["a"].max_rank == 0
    assert all(layer.rank == 1 for layer in timed if isinstance(layer, LowRankLayer))


def test_alike_layers_are_timed_once(timed: list[nn.Module]) -> None:
    def count(layers: dict[str, nn.Module], x: Tensor) -> int:
        timed.clear()
        assert len(fastest_ranks(layers, inputs_of(layers, x), min_speedup=1.2)) == len(layers)
        return len(timed)

    x = torch.randn(2, 16, 9)
    one = count({"a": nn.Conv1d(16, 16, 1)}, x)
    assert one > 0
    assert count({"a": nn.Conv1d(16, 16, 1), "b": nn.Conv1d(16, 16, 1)}, x) == one
    assert count({"a": nn.Conv1d(16, 16, 1), "b": nn.Conv1d(16, 16, 1, stride=2)}, x) == 2 * one
    assert count({"a": nn.Conv1d(16, 16, 1), "b": nn.Conv1d(16, 16, 1, bias=False)}, x) == 2 * one
    layers = {"a": nn.Conv1d(16, 16, 1), "b": nn.Conv1d(16, 16, 1)}
    timed.clear()
    inputs = inputs_of(layers, x) | {"b": torch.empty(2, 16, 99, device="meta")}
    fastest_ranks(layers, inputs, min_speedup=1.2)
    assert len(timed) == 2 * one


def test_layers_that_were_not_called_have_none() -> None:
    assert fastest_ranks({"a": nn.Linear(40, 40)}, {}, min_speedup=1.2) == {"a": Worth(0, {})}


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(3)
    layers: dict[str, nn.Module] = {"a": nn.Linear(24, 24), "b": nn.Conv2d(6, 6, 3).eval(), "c": nn.Linear(24, 24)}
    layers["c"].weight.grad = torch.ones(24, 24)
    inputs = {"a": torch.empty(2, 24, device="meta"), "b": torch.empty(1, 6, 5, 5, device="meta")}
    values = [parameter.clone() for layer in layers.values() for parameter in layer.parameters()]
    random_state = torch.get_rng_state()
    found = fastest_ranks(layers, inputs, min_speedup=0.0)
    assert found["a"].speedups and found["b"].speedups
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [layer.training for layer in layers.values()] == [True, False, True]
    assert layers["a"].weight.grad is None and layers["b"].weight.grad is None
    assert torch.equal(layers["c"].weight.grad, torch.ones(24, 24))
    for parameter, value in zip([p for layer in layers.values() for p in layer.parameters()], values, strict=True):
        assert torch.equal(parameter, value)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_runs_forward_and_backward_in_the_context_given() -> None:
    seen = []

    @contextmanager
    def context():
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(torch.is_grad_enabled())
            yield

    layers = {"a": nn.Linear(16, 16)}
    with torch.no_grad():  # as callbacks may be
        fastest_ranks(layers, inputs_of(layers, torch.randn(2, 16)), min_speedup=1e9, context=context)
    assert seen and all(seen)


def test_inputs_are_recorded_without_values() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear, self.unused = nn.Conv2d(3, 4, 1), nn.Linear(5, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=self.conv(x))

    network = Network()
    layers = dict(network.named_children())
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    with recorded_inputs(layers) as seen:
        network(x)
    assert seen.keys() == {"conv", "linear"}
    assert seen["conv"].is_meta and seen["conv"].shape == x.shape and seen["conv"].stride() == x.stride()
    assert seen["linear"].shape == (2, 4, 6, 5)
    network(x[:1])
    assert seen["conv"].shape[0] == 2  # closed


def test_hooks_go_after_an_error_too() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), recorded_inputs({"a": layer}):
        layer(torch.randn(2, 4))
    assert not layer._forward_pre_hooks
