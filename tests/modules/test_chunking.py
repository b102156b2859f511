"""A fake separator whose sources are pointwise functions of the mixture, numbered anew in every chunk."""

import pytest
import torch

from modules.chunking import separate_in_chunks, split_chunks, stitch_sources


def separate(mixture: torch.Tensor) -> torch.Tensor:
    """(B, t) -> (B, 3, t)"""
    return torch.stack([mixture.clamp_min(0), mixture.clamp_max(0), 0.3 * mixture.square()], 1)


class PermutingSeparator:
    """Another order of the sources in every call and for every item; the first call keeps theirs."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.lengths: list[int] = []

    def __call__(self, mixture: torch.Tensor) -> torch.Tensor:
        sources = separate(mixture)
        if self.lengths:
            orders = [torch.randperm(3, generator=self.generator) for _ in sources]
            sources = torch.stack([item[order] for item, order in zip(sources, orders, strict=True)])
        self.lengths.append(mixture.shape[-1])
        return sources


@pytest.mark.parametrize("num_samples", [1, 99, 100, 101, 180, 181, 260, 1234])
@pytest.mark.parametrize("overlap_samples", [20, 50, 90])
def test_reconstruction_is_exact(num_samples, overlap_samples):
    mixture = torch.randn(4, num_samples, generator=torch.Generator().manual_seed(num_samples))
    separator = PermutingSeparator()
    output = separate_in_chunks(separator, mixture, chunk_samples=100, overlap_samples=overlap_samples)
    assert torch.equal(output, separate(mixture))
    assert set(separator.lengths) == {min(num_samples, 100)}  # never padded
    hops = max(num_samples - 100, 0) / (100 - overlap_samples)
    assert len(separator.lengths) == 1 + -(-hops // 1)  # and no more calls than needed


def test_chunks_cover_the_mixture_and_overlap():
    mixture = torch.arange(1000.0)[None]
    pieces = list(split_chunks(mixture, chunk_samples=128, overlap_samples=32))
    starts = [start for start, _ in pieces]
    assert starts[0] == 0
    assert starts[-1] + 128 == 1000
    assert all(0 < after - before <= 128 - 32 for before, after in zip(starts, starts[1:], strict=False))
    assert all(torch.equal(chunk[0], mixture[0, start : start + 128]) for start, chunk in pieces)


def test_cross_fade_is_linear_and_sums_to_one():
    ones = torch.ones(1, 1, 6)
    output = stitch_sources([(0, ones), (2, 2 * ones)], 8)[0, 0]
    expected = torch.tensor([1, 1, 1.125, 1.375, 1.625, 1.875, 2, 2])
    torch.testing.assert_close(output, expected)


def test_loud_sources_decide_the_order():
    """Leakage of a loud source into a quiet one does not turn the two around."""
    loud = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    chunk = torch.cat([loud, 0.1 * loud], 1)  # the second source pauses, and only the leak is left
    output = stitch_sources([(0, chunk), (0, chunk.flip(1))], 100)
    torch.testing.assert_close(output, chunk)


def test_a_bad_chunk_does_not_stop_the_others():
    good = torch.ones(1, 2, 10)
    output = stitch_sources([(0, good), (5, torch.full((1, 2, 10), torch.nan)), (10, good)], 20)
    assert output[..., :5].isfinite().all()
    assert output[..., 15:].isfinite().all()


@pytest.mark.parametrize("overlap_samples", [0, -1, 100, 200])
def test_wrong_overlap(overlap_samples):
    with pytest.raises(ValueError, match="overlap of chunks must be between 0 and .* 100 samples"):
        separate_in_chunks(separate, torch.zeros(1, 500), chunk_samples=100, overlap_samples=overlap_samples)


def test_gaps_are_refused():
    sources = torch.zeros(1, 2, 10)
    with pytest.raises(ValueError, match="does not overlap"):
        stitch_sources([(0, sources), (10, sources)], 20)
    with pytest.raises(ValueError, match="cover 10 of 20 samples"):
        stitch_sources([(0, sources)], 20)


@pytest.mark.parametrize("num_samples", [1001, 1530, 2317])
def test_talkers_who_pause_in_an_overlap(num_samples):
    """Three talkers numbered anew in every chunk, each silent for a while, so that some overlaps hold only two."""
    generator = torch.Generator().manual_seed(num_samples)
    talkers = torch.randn(2, 3, num_samples, generator=generator)
    time = torch.arange(num_samples)
    for talker in range(3):
        talkers[:, talker, (time // 150) % 3 == talker] = 0  # and chunks begin anywhere in it

    def pieces():
        for start, _ in split_chunks(talkers[:, 0], chunk_samples=400, overlap_samples=100):
            order = torch.randperm(3, generator=generator) if start else torch.arange(3)
            yield start, talkers[:, order, start : start + 400]

    torch.testing.assert_close(stitch_sources(pieces(), num_samples), talkers)


def test_leakage_and_other_levels_do_not_confuse_the_order():
    """A separator that is no more than 10 dB good, and puts its sources out at other levels in every chunk."""
    generator = torch.Generator().manual_seed(1)
    talkers = torch.randn(1, 2, 4000, generator=generator)
    flip = False
    chunks = []
    for start, _ in split_chunks(talkers[:, 0], chunk_samples=800, overlap_samples=200):
        sources = talkers[..., start : start + 800]
        sources = (sources + 0.3 * sources.flip(1)) * (0.5 + torch.rand(1, 2, 1, generator=generator))
        chunks.append((start, sources.flip(1) if flip else sources))
        flip = not flip
    output = stitch_sources(chunks, 4000)
    own = (output * talkers).sum(-1)
    assert (own > (output * talkers.flip(1)).sum(-1)).all()
    error = output - talkers
    for block in error.split(400, -1):  # everywhere, not on average alone
        assert block.square().mean() < 0.6
