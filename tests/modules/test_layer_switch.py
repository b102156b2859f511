"""A network in training switches layers: all or none, with the state of its optimisers, equally in all processes."""

import pytest
import torch
from torch import Tensor, nn

from modules.layer_switch import switch_layers
from modules.low_rank import LowRankConv, LowRankLinear, decompose, ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.PReLU(), nn.Conv1d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 7, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num: int) -> float:
    """Steps on one batch; the loss before them."""
    losses = []
    for _ in range(num):
        batch = torch.linspace(-1, 1, 3 * 4 * 9).reshape(3, 4, 9).to(model[0].bias)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0]


def test_layers_switch_and_then_shrink() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    dense, bias = model[0], model[0].bias
    replaced, lost = switch_layers(model, {"0": 5, "4": 4}, optimizers=[optimizer])
    assert isinstance(model[0], LowRankConv) and isinstance(model[4], LowRankLinear)
    assert replaced == {"0": (dense, model[0]), "4": (replaced["4"][0], model[4])} and lost == []
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    train(model, optimizer, 3)
    before = model[0]
    replaced, _ = switch_layers(model, {"0": 2}, optimizers=[optimizer])
    assert replaced["0"] == (before, model[0]) and ranks(model) == {"0": 2, "4": 4}
    assert model[0].bias is bias
    tail = decompose(before.to_dense().weight).singular_values[2:].norm()
    error = (before.to_dense().weight - model[0].to_dense().weight).norm()
    torch.testing.assert_close(error.double(), tail, rtol=1e-4, atol=0)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.state.keys() == set(model.parameters())
    train(model, optimizer, 1)


def test_a_switch_at_full_rank_leaves_the_function_alone() -> None:
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    before = train(model, optimizer, 1)
    for wanted in ({"0": 8, "4": 5}, {"0": 8}):
        switch_layers(model, wanted, optimizers=[optimizer])
        assert abs(train(model, optimizer, 1) - before) < 1e-12


@pytest.mark.parametrize(("wanted", "message"), [({"0": 3, "4": 6}, "from 1 to 5"), ({"0": 3, "1": 1}, "PReLU cannot")])
def test_after_an_error_nothing_has_changed(wanted: dict[str, int], message: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        switch_layers(model, wanted, optimizers=[optimizer])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.state.keys() == set(parameters)


@pytest.mark.parametrize("rank", [0, 4])
def test_ranks_only_fall(rank: int) -> None:
    model = network()
    switch_layers(model, {"0": 3})
    with pytest.raises(ValueError, match=f"a layer of rank 3 cannot take rank {rank}"):
        switch_layers(model, {"0": rank})


def test_moments_are_chosen() -> None:
    for moments, known in (("project", True), ("reset", False)):
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        train(model, optimizer, 2)
        switch_layers(model, {"0": 3}, optimizers=[optimizer], moments=moments)
        assert (model[0].u in optimizer.state) is known


def test_processes_that_compute_differently_hold_the_same() -> None:
    """Whatever a decomposition gives goes through *share*, on the CPU: a process's own values do not matter."""
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu" and tensor.is_contiguous()
        sent.append(tensor.clone())
        return tensor

    first, second = network(), network()
    switch_layers(first, {"0": 4}, share=send)
    switch_layers(first, {"0": 2}, share=send)
    arriving = iter(sent)
    with torch.no_grad():
        second[0].weight.mul_(1 + 1e-5)  # as if its library rounded otherwise
    switch_layers(second, {"0": 4}, share=lambda _: next(arriving).clone())
    with torch.no_grad():
        second[0].u.mul_(1 + 1e-5)
    switch_layers(second, {"0": 2}, share=lambda _: next(arriving).clone())
    assert next(arriving, None) is None
    assert torch.equal(first[0].u, second[0].u) and torch.equal(first[0].v, second[0].v)


def test_frozen_biases_and_evaluation_stay() -> None:
    model = network().eval()
    model[0].bias.requires_grad_(False)
    switch_layers(model, {"0": 4})
    model[0].v.requires_grad_(False)
    switch_layers(model, {"0": 2})
    assert not model[0].training and model[0].u.requires_grad
    assert not model[0].v.requires_grad and not model[0].bias.requires_grad
