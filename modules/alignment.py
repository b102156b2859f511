"""Soft alignment of the far end with the microphone: attention over the last frames of the far end.

Paper: Indenbom et al., "DeepVQE: Real Time Deep Voice Quality Enhancement for Joint Acoustic Echo Cancellation, Noise
Suppression and Dereverberation", Interspeech 2023, arXiv:2306.03177, "soft alignment".

Decisions that are not obvious:
* Index d of the delay axis is a delay of d frames, as in the paper's text; public implementations count backwards.
* The literal form unfolds the far end over all delays: B x C x D x T x F numbers. Here time is cut into blocks of about
  D frames, and the frames of a block meet those of their own and of the previous block in one matrix product. The
  delays are a band of this product, and a band is a view of the matrix with rows one element shorter.
* The score convolution sees no later frame: all its padding in time is on top. The paper's 3 frames of padding on a
  kernel of 5 would look one frame ahead.
* Scores of frames before the first are zero, without the bias of the projection.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast


def _blocks(num_frames: int, num_delays: int) -> tuple[int, int]:
    """How many blocks, and frames per block: no fewer than delays, so that a frame meets two blocks at most."""
    blocks = max(round(num_frames / num_delays), 1)
    return blocks, max(num_delays, -(-num_frames // blocks))


def _windows(x: Tensor, blocks: int) -> Tensor:
    """Each block of L frames behind its previous one (zeros before the first), time running backwards.

    Shape: (..., blocks * L, N) -> (..., blocks, 2 L, N).
    """
    own = x.unflatten(-2, (blocks, -1)).flip(-2)  # (..., blocks, L, N)
    previous = F.pad(own, (0, 0, 0, 0, 1, 0))[..., :-1, :, :]
    return torch.cat((own, previous), -2)


def banded_scores(query: Tensor, key: Tensor, num_delays: int) -> Tensor:
    """Scalar products with present and past frames: scores[t, d] = query[t] . key[t - d], 0 where d > t.

    Shape: query, key (..., T, N) -> (..., T, num_delays).
    """
    num_frames = query.shape[-2]
    band = min(num_delays, num_frames)
    blocks, length = _blocks(num_frames, band)
    missing = blocks * length - num_frames
    if missing:
        query, key = F.pad(query, (0, 0, 0, missing)), F.pad(key, (0, 0, 0, missing))
    products = query.unflatten(-2, (blocks, length)) @ _windows(key, blocks).transpose(-1, -2)  # (..., blocks, L, 2 L)
    # Row a has delay d in column L - 1 - a + d: read with rows one shorter, every delay stands in one column.
    skewed = products.flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 1)]
    scores = skewed.unflatten(-1, (length, 2 * length - 1))[..., :band].flatten(-3, -2)  # (..., blocks * L, band)
    return F.pad(scores[..., :num_frames, :], (0, num_delays - band))


def banded_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of present and past frames: sums[t] = sum_d weights[t, d] values[t - d], zeros before frame 0.

    Shape: weights (..., T, D), values (..., T, N) -> (..., T, N).
    """
    num_frames = weights.shape[-2]
    band = min(weights.shape[-1], num_frames)
    blocks, length = _blocks(num_frames, band)
    missing = blocks * length - num_frames
    # The matrices whose band the weights are: banded_scores backwards.
    rows = F.pad(weights[..., :band], (0, 2 * length - 1 - band, 0, missing))  # (..., blocks * L, 2 L - 1)
    skewed = F.pad(rows.unflatten(-2, (blocks, length)).flatten(-2), (length - 1, 1))
    matrices = skewed.unflatten(-1, (length, 2 * length))  # (..., blocks, L, 2 L)
    values = F.pad(values, (0, 0, 0, missing)) if missing else values
    return (matrices @ _windows(values, blocks)).flatten(-3, -2)[..., :num_frames, :]


class SoftAlignment(nn.Module):
    """Finds the delay of the far end in the microphone signal and delays the far end's features by it.

    Arguments
        mic_channels, far_channels: of the features.
        hidden_channels: of their projections, whose products over all bins are the scores.
        max_delay_frames: delays 0 to max_delay_frames - 1 are considered.
        scale: divides the products by the root of the number of bins.
        temperature: divides the logits; below 1 sharpens the distribution. A buffer, because who anneals it writes
            there, and because a checkpoint without it would align worse than the training did.
        mask_start: frames before the first get no weight. Otherwise they are silent frames like others and hold most
            of it at the beginning.

    Shape: mic (B, mic_channels, T, F), far (B, far_channels, T, F) -> the delayed far (B, far_channels, T, F), and the
    distribution over delays (B, T, max_delay_frames), which adds up to one over the last axis.

    Raises ValueError for arguments that do not fit. Scores, softmax and sums stay in float32 under autocast.
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        mic_channels: int,
        far_channels: int,
        hidden_channels: int,
        max_delay_frames: int,
        scale: bool = True,
        temperature: float = 1.0,
        mask_start: bool = False,
    ) -> None:
        super().__init__()
        if max_delay_frames < 1:
            raise ValueError(f"SoftAlignment: max_delay_frames must be at least 1, got {max_delay_frames!r}")
        if not temperature > 0:
            raise ValueError(f"SoftAlignment: temperature must be above 0, got {temperature!r}")
        self.far_channels = far_channels
        self.max_delay_frames = max_delay_frames
        self.scale = scale
        self.mask_start = mask_start
        self.mic_projection = nn.Conv2d(mic_channels, hidden_channels, 1)
        self.far_projection = nn.Conv2d(far_channels, hidden_channels, 1)
        self.score_conv = nn.Conv2d(hidden_channels, 1, (5, 3), padding=(4, 1))
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, mic: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.mic_projection(mic), self.far_projection(far)  # (B, H, T, F)
        with without_autocast(far.device.type):
            wide = torch.promote_types(far.dtype, torch.float32)
            distribution = self.delay_distribution(query.to(wide), key.to(wide))
            frames = far.to(wide).permute(0, 2, 3, 1).flatten(2)  # (B, T, F * C)
            aligned = banded_sum(distribution, frames).unflatten(2, (-1, far.shape[1])).permute(0, 3, 1, 2)
        return aligned.to(far.dtype), distribution

    def delay_distribution(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, T, F) twice -> (B, T, D)"""
        num_frames, num_bins = query.shape[2:]
        if self.scale:
            query = query / math.sqrt(num_bins)
        scores = banded_scores(query, key, self.max_delay_frames)  # (B, H, T, D)
        # Zeros on both sides come free with the convolution; the frames after the last are cut off.
        logits = self.score_conv(scores)[:, 0, :num_frames] / self.temperature  # (B, T, D)
        if self.mask_start:
            exists = logits.new_ones(num_frames, self.max_delay_frames, dtype=torch.bool).tril()  # d <= t
            logits = logits.masked_fill(~exists, -math.inf)
        return logits.softmax(-1)
