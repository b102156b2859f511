"""Masking of blocks of frames, whose targets the network then has to predict.

The maps from random numbers to masks are those of NeMo 3.0.0 (RandomBlockMasking), with and without overlap. Neither
ever masks a frame behind an item's end, and an item shorter than a block gets no mask where blocks may overlap.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checks import numbers, switches, whole_numbers
from modules.counter_random import uniform


def overlapping_blocks(scores: Tensor, length: Tensor, *, block_size: int, mask_prob: float) -> Tensor:
    """Each frame with room for a block behind it starts one with probability *mask_prob*; blocks may overlap.

    Arguments
        scores: random numbers in [0, 1), one for each frame.
        length: valid frames of each item.
        block_size: frames of a block.

    Shape: (B, T) and (B,) -> (B, T) bool, true where masked.
    """
    num_frames = scores.shape[1]
    frames = torch.arange(num_frames, device=scores.device)
    starts = (scores < mask_prob) & (frames + block_size <= length[:, None])
    num_started = starts.cumsum(1)  # (B, T): up to this frame, itself included
    num_ended = F.pad(num_started, (block_size, 0))[:, :num_frames]
    return num_started > num_ended


def separate_blocks(scores: Tensor, offset: Tensor, length: Tensor, *, block_size: int, mask_prob: float) -> Tensor:
    """Masks about *mask_prob* of each item in blocks that do not overlap.

    An item is divided into slots of a block each. As many slots as are needed, those of the highest scores, are
    masked, all shifted by a common offset below a block. Blocks of an item that is too short for them are shortened.

    Arguments
        scores: random numbers in [0, 1), one for each slot; there are fewer slots than frames.
        offset: random numbers in [0, 1), the share of a block by which the slots are shifted.
        length: valid frames of each item.
        block_size: frames of a block.

    Shape: (B, T), (B,) and (B,) -> (B, T) bool, true where masked.
    """
    num_frames = scores.shape[1]
    frames = torch.arange(num_frames, device=scores.device)
    num_blocks = torch.ceil(length * mask_prob / block_size).long()  # (B,), as all until `ranked`; float32, as NeMo
    shortened = (length // (num_blocks + 1)).clamp_min(1)
    block = torch.where((num_blocks + 1) * block_size > length, shortened, block_size)
    num_slots = (length // block - 1).clamp_min(0)  # one fewer than fit: the offset needs room
    num_blocks = torch.minimum(num_blocks, num_slots)

    most_blocks = math.ceil(num_frames * mask_prob / block_size)
    ranked = scores.masked_fill(frames >= num_slots[:, None], -1).topk(most_blocks).indices  # (B, most_blocks)
    wanted = torch.arange(most_blocks, device=scores.device) < num_blocks[:, None]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ranked, wanted)  # (B, T): slots

    shifted = frames - (offset * block).long()[:, None]  # (B, T)
    slot = shifted.clamp_min(0) // block[:, None]
    return chosen.gather(1, slot) & (shifted >= 0)


class RandomBlockMasking(nn.Module):
    """Puts one vector in the place of randomly chosen blocks of frames.

    Arguments
        feat_in: features of a frame.
        mask_prob: with overlap the probability that a frame starts a block, without it the share of masked frames.
        block_size: frames of a block.
        mask_value: every element of the vector, which is then never trained; null: drawn from N(0, 0.1 ** 2).
        freeze: the vector is not trained.
        allow_overlap: see `overlapping_blocks` and `separate_blocks`.
        max_mask_ratio: without effect, as in NeMo 3.0.0.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        *,
        feat_in: int,
        mask_prob: float = 0.5,
        block_size: int = 48,
        mask_value: float | None = None,
        freeze: bool = True,
        allow_overlap: bool = False,
        max_mask_ratio: float = 0.8,
    ) -> None:
        super().__init__()
        numbers(mask_prob=mask_prob, least=0, most=1)
        whole_numbers(feat_in=feat_in, block_size=block_size)
        switches(freeze=freeze, allow_overlap=allow_overlap)
        if mask_value is not None:
            numbers(mask_value=mask_value, least=-math.inf, most=math.inf)
        if max_mask_ratio != 0.8:
            warnings.warn("max_mask_ratio has no effect, as in NeMo 3.0.0", stacklevel=2)
        self.mask_prob = mask_prob
        self.block_size = block_size
        self.allow_overlap = allow_overlap
        vector = torch.randn(feat_in) * 0.1 if mask_value is None else torch.full((feat_in,), float(mask_value))
        self.mask_embedding = nn.Parameter(vector, requires_grad=mask_value is None and not freeze)

    def draw(self, num_frames: int, length: Tensor, seeds: Tensor | None = None) -> Tensor:
        """A mask that depends on each item's seed and length only; without seeds, on torch's generator, as in NeMo.

        Shape: length (B,), seeds (B,) int64 -> (B, num_frames) bool.
        """
        sizes = {"block_size": self.block_size, "mask_prob": self.mask_prob}
        if seeds is None:
            scores = torch.rand(len(length), num_frames, device=length.device)
        else:
            scores = uniform(seeds, num_frames)
        if self.allow_overlap:
            return overlapping_blocks(scores, length, **sizes)
        if seeds is None:
            offset = torch.rand(len(length), device=length.device)
        else:
            offset = uniform(seeds, 1, stream=1).squeeze(1)
        return separate_blocks(scores, offset, length, **sizes)

    def hide(self, features: Tensor, mask: Tensor) -> Tensor:
        """Shape: (B, feat_in, T) and (B, T) bool -> (B, feat_in, T)."""
        return torch.where(mask[:, None], self.mask_embedding.to(features.dtype)[:, None], features)

    def forward(self, features: Tensor, length: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Shape: (B, feat_in, T), length (B,), seeds (B,) int64 -> (B, feat_in, T) and the mask (B, T) bool."""
        mask = self.draw(features.shape[2], length, seeds)
        return self.hide(features, mask), mask
