"""Ranks that a spectrum nearly has, and that of noise."""

import pytest
import torch

from modules.spectrum import (
    captured_energy,
    in_float64,
    rank_for_energy,
    rank_of_noise,
    singular_values_of,
    singular_values_of_factors,
    stable_rank,
)


def test_singular_values_of_a_weight_and_of_factors() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(7, 3), torch.randn(3, 10)
    weight = (u @ v).view(7, 5, 2)
    s = singular_values_of(weight)
    assert s.dtype == torch.float64 and s.shape == (7,)
    torch.testing.assert_close(singular_values_of_factors(u, v), s[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(s.square().sum(), in_float64(weight).square().sum())
    wide = singular_values_of_factors(torch.randn(2, 4), torch.randn(4, 9))  # more columns than the product has rank
    assert len(wide) == 4 or (wide[2:] < 1e-12).all()


def test_stable_rank() -> None:
    assert stable_rank(torch.tensor([2.0, 2, 2, 2])) == 4
    assert stable_rank(torch.tensor([3.0, 0, 0])) == 1
    assert stable_rank(torch.tensor([2.0, 1, 1])) == 1.5
    assert stable_rank(torch.zeros(3)) == 0


def test_energy() -> None:
    s = torch.tensor([3.0, 2, 1]).double()  # squares 9, 4, 1
    assert [round(captured_energy(s, rank), 3) for rank in (0, 1, 2, 3)] == [0, 0.643, 0.929, 1]
    assert [rank_for_energy(s, energy) for energy in (0.0, 0.6, 0.65, 0.92, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 1 and captured_energy(torch.zeros(3), 1) == 1
    assert rank_for_energy(torch.tensor([1.0, 0, 0]), 1.0) == 1


@pytest.mark.parametrize("shape", [(192, 192), (256, 64), (50, 600)])
def test_rank_of_noise_is_that_of_random_matrices(shape: tuple[int, int]) -> None:
    matrix = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    s = singular_values_of(matrix)
    for energy in (0.3, 0.5, 0.9, 0.99):
        assert abs(rank_for_energy(s, energy) - rank_of_noise(*shape, energy)) < 2
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5  # whatever the distribution
    assert abs(rank_for_energy(singular_values_of(uniform), 0.9) - rank_of_noise(*shape, 0.9)) < 2
