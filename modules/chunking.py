"""Long recordings in chunks: overlapping pieces go through a separator one by one and are stitched together.

A separator numbers its outputs anew in every chunk. Each chunk is therefore put in the order of what has been
stitched so far: of all permutations, the one with the greatest correlation on the overlap. That is also the
one with the least squared error, so a source that is quiet there weighs little. Over an overlap in which all
are silent there is nothing to go by.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def separate_in_chunks(
    separate: Callable[[Tensor], Tensor], mixture: Tensor, *, chunk_samples: int, overlap_samples: int
) -> Tensor:
    """Runs `separate`, (B, t) -> (B, C, t), over chunks that overlap by at least `overlap_samples`.

    A mixture of at most one chunk is separated as a whole. Otherwise all chunks have exactly `chunk_samples`,
    without padding (a separator whose norms average over time would hear it), and memory is that of one
    chunk.

    Shape: (B, T) -> (B, C, T).

    Raises ValueError unless 0 < overlap_samples < chunk_samples.
    """
    pieces = split_chunks(mixture, chunk_samples=chunk_samples, overlap_samples=overlap_samples)
    return stitch_sources(((start, separate(chunk)) for start, chunk in pieces), mixture.shape[-1])


def split_chunks(
    mixture: Tensor, *, chunk_samples: int, overlap_samples: int, unit: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yields (start, view) of the chunks: as few as cover the mixture, evenly spread.

    *unit*: chunks start at multiples of it; the lengths of mixture, chunks and overlap must be multiples too.

    Shape: (B, T) -> (B, chunk_samples) each, or (B, T) when T <= chunk_samples.
    """
    if not 0 < overlap_samples < chunk_samples:
        raise ValueError(
            f"the overlap of chunks must be between 0 and the chunk's length of {chunk_samples} samples, "
            f"both excluded, got {overlap_samples} samples"
        )
    if mixture.shape[-1] % unit or chunk_samples % unit or overlap_samples % unit:
        raise ValueError(
            f"lengths of {mixture.shape[-1]}, {chunk_samples}, {overlap_samples} are no multiples of {unit}"
        )
    return _iterate_chunks(mixture, chunk_samples, chunk_samples - overlap_samples, unit)


def _iterate_chunks(mixture: Tensor, chunk_samples: int, hop_samples: int, unit: int) -> Iterator[tuple[int, Tensor]]:
    rest = max(mixture.shape[-1] - chunk_samples, 0)  # what the first chunk leaves
    num_hops = -(-rest // hop_samples)
    for index in range(num_hops + 1):
        start = index * (rest // unit) // max(num_hops, 1) * unit
        yield start, mixture[..., start : start + chunk_samples]


def stitch_sources(chunks: Iterable[tuple[int, Tensor]], num_samples: int) -> Tensor:
    """Joins separated chunks (start, sources): the first starts at 0, each further one overlaps those before.

    Sources are permuted as described above and cross-faded over the overlap with weights that sum to one.

    Shape: (B, C, t) each -> (B, C, num_samples).

    Raises ValueError for a gap between chunks and for chunks that do not cover `num_samples`.
    """
    pieces = iter(chunks)
    _, sources = next(pieces)
    output = sources.new_zeros(*sources.shape[:-1], num_samples)
    end = sources.shape[-1]  # of what has been stitched
    output[..., :end] = sources
    for start, sources in pieces:
        overlap = end - start
        if overlap < 1:
            raise ValueError(f"the chunk at sample {start} does not overlap those before, which end at {end}")
        before = output[..., start:end]
        sources = _align(sources, before)
        # Half a step inside both ends: the weights are neither 0 nor 1, and symmetric.
        fade = (torch.arange(overlap, device=sources.device, dtype=sources.dtype) + 0.5) / overlap
        output[..., start:end] = torch.lerp(before, sources[..., :overlap], fade)
        output[..., end : start + sources.shape[-1]] = sources[..., overlap:]
        end = start + sources.shape[-1]
    if end != num_samples:
        raise ValueError(f"the chunks cover {end} of {num_samples} samples")
    return output


def _align(sources: Tensor, before: Tensor) -> Tensor:
    """Permutes sources (B, C, t) so that their first samples correlate best with `before` (B, C, overlap)."""
    from scipy.optimize import linear_sum_assignment  # a slow import that short recordings do not need

    correlation = before.double() @ sources[..., : before.shape[-1]].double().mT  # (B, C, C)
    # Values that are not finite would be refused, though one bad chunk is no reason to stop.
    weights = correlation.nan_to_num().cpu().numpy()
    orders = [torch.from_numpy(linear_sum_assignment(item, maximize=True)[1]) for item in weights]
    permutation = torch.stack(orders).to(sources.device)  # (B, C)
    return torch.take_along_dim(sources, permutation.unsqueeze(-1), dim=1)
