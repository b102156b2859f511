"""Sub-sampling of mel frames by strided depth-wise separable convolutions, as in front of Fast-Conformer.

Paper: Rekesh et al., "Fast Conformer with Linearly Scalable Attention for Efficient Speech Recognition", 2023,
arXiv:2305.05084. Names and values are those of NeMo's `ConvSubsampling` (dw_striding).

Decisions that are not obvious:
* Each of the log2(factor) stages ends in a ReLU, and in front of it frames behind an item's end are set to zero. What a
  stage's 1x1 convolution makes of such frames is overwritten there, so masking before every layer, as NeMo does, gives
  the same numbers.
* A frame of padding is hence all zeros behind the last stage, and equals the bias of `out` in the output.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.cpu_layers import Linear

Count = TypeVar("Count", int, Tensor)


def padding_mask(length: Tensor, num_frames: int) -> Tensor:
    """True for the frames behind an item's end. Shape: (B,) -> (B, num_frames) bool."""
    return torch.arange(num_frames, device=length.device) >= length[:, None]


class _CausalConv2d(nn.Conv2d):
    """Convolution whose output at time t sees nothing behind stride * t, and likewise in frequency."""

    def forward(self, input: Tensor) -> Tensor:
        left, right = self.kernel_size[0] - 1, self.stride[0] - 1
        return super().forward(F.pad(input, (left, right, left, right)))


class DwStridingSubsampling(nn.Module):
    """Divides the frame rate: a convolution, then pairs of depth-wise and 1x1 convolutions, then a linear layer.

    Arguments
        feat_in: mel channels F.
        feat_out: width D of the output.
        subsampling_factor: a power of two, at least 2.
        conv_channels: of the convolutions.
        causal: each stage pads 2 in front and 1 behind instead of 1 on both sides, in time and in frequency, so that
            output frame t sees mel frames up to subsampling_factor * t.

    Shape: features (B, T, F), length (B,) -> (B, T', D), (B,). Each stage makes ceil(L / 2) frames of L, a causal one
    floor(L / 2) + 1; the same holds for lengths and for the mel axis.

    Raises ValueError for a factor that is no power of two.
    """

    def __init__(
        self,
        *,
        feat_in: int,
        feat_out: int,
        subsampling_factor: int = 8,
        conv_channels: int = 256,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if subsampling_factor < 2 or subsampling_factor & (subsampling_factor - 1):
            raise ValueError(f"subsampling_factor must be a power of two, got {subsampling_factor!r}")
        self.causal = causal
        conv, padding = (_CausalConv2d, 0) if causal else (nn.Conv2d, 1)
        layers: list[nn.Module] = [conv(1, conv_channels, 3, stride=2, padding=padding), nn.ReLU(inplace=True)]
        num_bins = self._halve(feat_in)
        for _ in range(subsampling_factor.bit_length() - 2):
            layers += [
                conv(conv_channels, conv_channels, 3, stride=2, padding=padding, groups=conv_channels),
                nn.Conv2d(conv_channels, conv_channels, 1),
                nn.ReLU(inplace=True),
            ]
            num_bins = self._halve(num_bins)
        self.out = Linear(conv_channels * num_bins, feat_out)
        self.conv = nn.Sequential(*layers)

    def _halve(self, count: Count) -> Count:
        return count // 2 + 1 if self.causal else (count + 1) // 2

    def forward(self, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        x = features.masked_fill(padding_mask(length, features.shape[1])[..., None], 0)[:, None]  # (B, 1, T, F)
        for layer in self.conv:
            if isinstance(layer, nn.ReLU):  # the end of a stage
                length = self._halve(length)
                x = x.masked_fill_(padding_mask(length, x.shape[2])[:, None, :, None], 0)
            x = layer(x)  # (B, channels, frames, bins)
        return self.out(x.transpose(1, 2).flatten(2)), length  # channels first, bins fastest


class LinearProjection(Linear):
    """What stands in the place of sub-sampling where its factor is 1. Shape: (B, T, F), (B,) -> (B, T, D), (B,)."""

    def forward(self, input: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input), length
