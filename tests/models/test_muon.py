"""Muon: orthogonal steps for matrices, Adam for the rest, exact resume."""

import copy

import pytest
import torch
from torch import nn

from models.muon import Muon, is_matrix, orthogonalised
from models.optim import build_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 8, 4), nn.PReLU(), nn.Conv1d(8, 6, 1), nn.GroupNorm(1, 6), nn.Conv1d(6, 6, 3, groups=6)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_which_weights_are_matrices() -> None:
    matrices = (torch.zeros(4, 3), torch.zeros(4, 3, 1), torch.zeros(4, 3, 5), torch.zeros(4, 3, 4, 3))
    others = (torch.zeros(4), torch.zeros(8, 1, 16), torch.zeros(4, 1), torch.zeros(1, 3, 5, 3))
    assert all(is_matrix(p) for p in matrices)
    assert not any(is_matrix(p) for p in others)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (20, 20)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found, wanted = orthogonalised(matrix), torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    polar = wanted.U @ wanted.Vh
    assert torch.nn.functional.cosine_similarity(found.flatten(), polar.flatten(), dim=0) > 0.97
    assert torch.isfinite(orthogonalised(torch.zeros(shape))).all()


def test_weights_that_are_no_matrices_move_as_with_adam() -> None:
    ours, peer = network(), network()
    for model in (ours, peer):
        model[2].weight.requires_grad_(False)
    train(ours, Muon(ours.parameters(), lr=0.01), 5)
    train(peer, torch.optim.Adam(peer.parameters(), lr=0.01), 5)
    for mine, theirs in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_matrices_move_in_all_directions_alike() -> None:
    model = network()
    before = model[2].weight.detach().clone()
    train(model, Muon(model.parameters(), lr=0.01, momentum=0.0), 1)
    values = torch.linalg.svdvals((model[2].weight - before)[:, :, 0]) / (0.01 * 0.2 * 8**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_resume_is_exact() -> None:
    whole, model = network(), network()
    train(whole, Muon(whole.parameters(), lr=0.01), 6)
    optimizer = Muon(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = Muon(model.parameters(), lr=0.5)
    resumed.load_state_dict(state)
    train(model, resumed, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_chosen_by_its_name() -> None:
    optimizer = build_optimizer(network().parameters(), {"name": "muon", "lr": 0.1, "betas": [0.8, 0.9], "fused": True})
    assert isinstance(optimizer, Muon) and len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["betas"] == [0.8, 0.9] and optimizer.param_groups[0]["momentum"] == 0.95
