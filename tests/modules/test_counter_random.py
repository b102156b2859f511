import pytest
import torch

from modules.counter_random import uniform

WORD = 2**64


def splitmix64(x: int) -> int:
    """The finaliser in whole numbers, as the paper writes it."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 1, 7])
def test_is_splitmix64(seed, stream):
    increment = 0x9E3779B97F4A7C15
    key = splitmix64((splitmix64((seed + increment) % WORD) + (stream + 1) * increment) % WORD)
    expected = [(splitmix64((key + n * increment) % WORD) >> 40) / 2**24 for n in range(1, 6)]
    assert uniform(torch.tensor([seed]), 5, stream=stream)[0].tolist() == expected


def test_bits_are_frozen():
    """Masks of a resumed run, and of validations of different versions, depend on it."""
    numbers = (uniform(torch.tensor([0, 1, -5]), 3) * 2**24).long()
    assert numbers.tolist() == [
        [2327157, 16292389, 4661262],
        [11635202, 16303542, 7156637],
        [15698207, 14122784, 14839768],
    ]
    assert (uniform(torch.tensor([42]), 2, stream=1) * 2**24).long().tolist() == [[566310, 12975462]]


def test_is_uniform():
    """Seeds that follow each other, as those of items do: moments, correlations, and 64 bins by chi-squared."""
    numbers = uniform(torch.arange(2000), 200).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(1 / 2, abs=4 * (1 / 12 / numbers.numel()) ** 0.5)
    assert numbers.var().item() == pytest.approx(1 / 12, rel=0.01)
    centred = numbers - 1 / 2
    error = 4 / 12 / numbers.numel() ** 0.5
    for neighbour in (
        centred.roll(1, 0),
        centred.roll(1, 1),
        centred.roll((1, 1), (0, 1)),
        centred.roll((1, -1), (0, 1)),
    ):
        assert abs((centred * neighbour).mean().item()) < error
    counts = torch.histc(numbers, 64, 0, 1)
    expected = numbers.numel() / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 63 + 4 * 126**0.5


def test_row_depends_on_its_seed_alone():
    seeds = torch.tensor([3, 14, 15, -9])
    together = uniform(seeds, 10)
    for index in range(4):
        torch.testing.assert_close(uniform(seeds[index : index + 1], 10)[0], together[index], rtol=0, atol=0)
    assert len(together.unique()) == together.numel()


def test_longer_rows_continue_shorter_ones():
    seeds = torch.arange(4)
    assert torch.equal(uniform(seeds, 10)[:, :5], uniform(seeds, 5))
    assert uniform(seeds, 0).shape == (4, 0)


def test_streams_differ():
    seeds = torch.arange(2000)
    first, second = uniform(seeds, 50).double(), uniform(seeds, 50, stream=1).double()
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / first.numel() ** 0.5


@pytest.mark.parametrize("seeds", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.long)])
def test_wrong_seeds(seeds):
    with pytest.raises(ValueError, match=r"^seeds must be int64 of shape \(batch,\)"):
        uniform(seeds, 3)
