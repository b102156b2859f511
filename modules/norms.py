"""Normalisation layers over feature maps (B, C, K), chosen by the name that a configuration gives.

| name | statistics of frame k | called elsewhere |
|---|---|---|
| global | all channels, all frames | gLN; GroupNorm with one group; not causal |
| cumulative | all channels, frames 0 to k | cLN in the paper; cgLN in asteroid |
| per_frame | all channels, frame k | layer norm over channels; cLN in asteroid, SpeechBrain, ESPnet |

Paper: Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
Separation", 2019. All: biased variance, 1e-8 under the root, a gain `weight` and a `bias` per channel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-8


def _inverse_deviation(variance: Tensor) -> Tensor:
    """1 / sqrt(variance + EPS), written with 1 / EPS: the ONNX exporter's optimiser takes a sum with 1e-8 for a sum
    with zero and drops it, and silence would come out as NaN."""
    return (variance * (1 / EPS) + 1).rsqrt() * EPS**-0.5


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x without each frame's mean over channels, that mean, and the variance: (B, C, K), twice (B, 1, K)."""
    channels = x.shape[1]  # sum / channels: the backward pass of mean divides a full tensor
    mean = x.sum(1, keepdim=True) / channels
    centred = x - mean
    return centred, mean, centred.square().sum(1, keepdim=True) / channels


def per_frame_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalises each frame with its own mean and variance over channels, float32 at least.

    On a CPU this is quicker than the library's layer norm, whose kernel wants the channels last: every convolution
    around it would then copy.

    Shape: (B, C, K) -> (B, C, K); gain `weight` and `bias` (C,).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred, _, variance = _centred(wide)
    normal = centred * _inverse_deviation(variance)
    return (normal * weight[:, None] + bias[:, None]).to(x.dtype)


def initial_totals(batch_size: int, *, device: torch.device | str | None = None) -> Tensor:
    """The totals of `cumulative_layer_norm` before the first frame: (batch_size, 3) zeros."""
    return torch.zeros(batch_size, 3, dtype=torch.float64, device=device)


def cumulative_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Normalises each frame with the statistics of itself and all frames before it, float32 at least.

    A frame's own mean and variance over channels are taken first, and only these two numbers are accumulated, in
    float64: the difference of large sums then costs no digits, after an hour of frames as little as after one.

    Arguments
        weight, bias: gain and offset, (C,).
        totals: of the frames before x, as `initial_totals` or an earlier call gave them, (B, 3) in float64: their
            number, the sum of their means, the sum of their mean squares.

    Shape: (B, C, K) and (B, 3) -> (B, C, K) and the totals that include x, (B, 3).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred, frame_mean, frame_variance = _centred(wide)
    frame_mean = frame_mean.double()  # (B, 1, K), as all that follows
    moments = [torch.ones_like(frame_mean), frame_mean, frame_variance.double() + frame_mean.square()]
    running = totals.unsqueeze(-1) + torch.cat(moments, 1).cumsum(-1)  # (B, 3, K)
    number, mean, mean_square = running.split(1, 1)
    mean = mean / number
    variance = (mean_square / number - mean.square()).clamp_min(0)
    scale = _inverse_deviation(variance)
    shift = (frame_mean - mean) * scale  # from the frame's mean to the running one
    normal = centred * scale.to(wide.dtype) + shift.to(wide.dtype)
    return (normal * weight[:, None] + bias[:, None]).to(x.dtype), running[..., -1]


class _ChannelNorm(nn.Module):
    """A gain and a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class PerFrameNorm(_ChannelNorm):
    """`per_frame_layer_norm`. Shape: (B, channels, K) -> (B, channels, K)."""

    def forward(self, x: Tensor) -> Tensor:
        return per_frame_layer_norm(x, self.weight, self.bias)


class CumulativeNorm(_ChannelNorm):
    """`cumulative_layer_norm` over a recording from its start. Shape: (B, channels, K) -> (B, channels, K)."""

    def forward(self, x: Tensor) -> Tensor:
        totals = initial_totals(x.shape[0], device=x.device)
        return cumulative_layer_norm(x, self.weight, self.bias, totals)[0]


def _global_layer_norm(channels: int) -> nn.Module:
    """gLN: statistics over all channels and all frames of an item.

    This is exactly a group norm with one group. On a CPU its fused kernel is about three times as fast as the
    best composition of elementwise operations, and it keeps one tensor for the backward pass.
    """
    return nn.GroupNorm(1, channels, eps=EPS)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "global": _global_layer_norm,
    "cumulative": CumulativeNorm,
    "per_frame": PerFrameNorm,
}


def make_norm(name: str, channels: int) -> nn.Module:
    """Builds the normalisation `name` for feature maps with `channels` channels.

    Shape: (B, channels, K) -> (B, channels, K).

    Raises ValueError when there is no normalisation of that name.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(sorted(NORMS))}, got {name!r}")
    return NORMS[name](channels)
