"""Conv-TasNet: a learned filter bank, masks from a temporal convolutional network, a learned synthesis.

Paper: Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
Separation", IEEE/ACM TASLP 27(8), 2019. The paper's symbols: C num_sources, N num_filters, L kernel_size,
B bottleneck_channels, H hidden_channels, Sc skip_channels, P block_kernel_size, X num_blocks, R num_repeats.

Decisions that are not obvious:
* Padding "centered", as in torchaudio: half a kernel of zeros on both sides and zeros on the right up to a whole
  number of strides. The first and last samples are then covered by as many frames as those between. "valid", as
  in asteroid, frames what is there: up to stride - 1 samples at the end come out as zeros. Global norms average
  over all frames, so the choice changes the whole output and a trained network keeps the one it was trained with.
* A causal network looks ahead within a frame only: output sample t depends on input samples before t + kernel_size,
  which makes its latency kernel_size samples. norm "global" looks at the whole recording all the same; public
  causal networks with it exist, so it is no error here.
* Without a skip path the masks come from the last block's output. With one, the last block has no residual
  branch, for nothing would read it.
* The filter bank and the synthesis stay in the precision of their weights under autocast: they cost nothing,
  and a waveform that went through bfloat16 carries audible noise at about -50 dB.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.cpu_layers import DepthwiseConv1d, PointwiseConv1d, PReLU, two_pointwise
from modules.norms import NORMS, make_norm


def _linear(x: Tensor) -> Tensor:
    return x


# Applied to (B, C, N, K), sources on axis 1.
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=1),
    "linear": _linear,
}
ENCODER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"linear": _linear, "relu": torch.relu}
PADDINGS = ("centered", "valid")


class ConvTasNet(nn.Module):
    """Separates a single-channel mixture into `num_sources` waveforms.

    Arguments
        num_sources: talkers in the mixture.
        num_filters, kernel_size, stride: the filter bank; the last two in samples, and a stride of None is half
            the kernel size.
        bottleneck_channels, hidden_channels, skip_channels: widths of a block's input and residual path, of its
            inside, and of the path that the masks are computed from (None: no such path).
        block_kernel_size: frames that a depthwise convolution spans.
        num_blocks, num_repeats: blocks of dilation 1, 2, 4, ... 2**(num_blocks - 1), this often in a row.
        norm: a name of `modules.norms.NORMS`. mask: a name of `MASKS` ("softmax": over the sources).
        causal: the depthwise convolutions see no later frame; with norm "cumulative" or "per_frame" the latency
            is then kernel_size samples, and modules/conv_tasnet_stream.py runs the network frame by frame.
        padding: of the recording's ends, a name of `PADDINGS`.
        encoder_activation: a name of `ENCODER_ACTIVATIONS`, applied to what the filter bank gives.

    Shape: (B, T) -> (B, num_sources, T) for every T >= 1.

    Raises ValueError that names every argument which does not fit, and for an input of another shape.
    """

    def __init__(
        self,
        *,
        num_sources: int = 2,
        num_filters: int = 512,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck_channels: int = 128,
        hidden_channels: int = 512,
        skip_channels: int | None = 128,
        block_kernel_size: int = 3,
        num_blocks: int = 8,
        num_repeats: int = 3,
        norm: str = "global",
        mask: str = "relu",
        causal: bool = False,
        padding: str = "centered",
        encoder_activation: str = "linear",
    ) -> None:
        super().__init__()
        sizes = {
            "num_sources": num_sources,
            "num_filters": num_filters,
            "kernel_size": kernel_size,
            "stride": 1 if stride is None else stride,
            "bottleneck_channels": bottleneck_channels,
            "hidden_channels": hidden_channels,
            "skip_channels": 1 if skip_channels is None else skip_channels,
            "block_kernel_size": block_kernel_size,
            "num_blocks": num_blocks,
            "num_repeats": num_repeats,
        }
        names = {"norm": norm, "mask": mask, "padding": padding, "encoder_activation": encoder_activation}
        _check_arguments(sizes, names, causal)
        self.num_sources = num_sources
        self.kernel_size = kernel_size
        self.stride = max(kernel_size // 2, 1) if stride is None else stride
        self.norm = norm
        self.causal = causal
        self.padding = padding
        self.encoder_activation = encoder_activation
        framing = {
            "kernel_size": kernel_size,
            "stride": self.stride,
            "padding": kernel_size // 2 if padding == "centered" else 0,
            "bias": False,
        }
        self.encoder = nn.Conv1d(1, num_filters, **framing)
        self.separator = Separator(
            num_sources=num_sources,
            num_filters=num_filters,
            bottleneck_channels=bottleneck_channels,
            hidden_channels=hidden_channels,
            skip_channels=skip_channels,
            block_kernel_size=block_kernel_size,
            num_blocks=num_blocks,
            num_repeats=num_repeats,
            norm=norm,
            mask=mask,
            causal=causal,
        )
        self.decoder = nn.ConvTranspose1d(num_filters, 1, **framing)

    def forward(self, mixture: Tensor) -> Tensor:
        if mixture.ndim != 2 or mixture.shape[-1] < 1:
            raise ValueError(f"mixture must have shape (batch, samples >= 1), got {tuple(mixture.shape)}")
        num_samples = mixture.shape[-1]
        if self.padding == "centered":
            # An odd kernel is centred on a sample, an even one between two: hence the parity.
            missing = -(num_samples - self.kernel_size % 2) % self.stride
        else:
            missing = cast(int, torch.sym_max(self.kernel_size - num_samples, 0))  # max would freeze it in exports
        padded = F.pad(mixture, (0, missing)).unsqueeze(1)  # (B, 1, T')
        with without_autocast(mixture.device.type):
            features = self.encoder(padded)  # (B, N, K)
            features = ENCODER_ACTIVATIONS[self.encoder_activation](features)
        masks = self.separator(features)  # (B, C, N, K)
        with without_autocast(mixture.device.type):
            masked = (masks * features.unsqueeze(1)).flatten(0, 1)  # (B * C, N, K)
            sources = self.decoder(masked)  # (B * C, 1, T'')
        sources = sources.unflatten(0, (-1, self.num_sources)).squeeze(2)  # (B, C, T'')
        # A slice to num_samples does the same, but freezes in an exported graph whether there was padding.
        return F.pad(sources, (0, num_samples - sources.shape[-1]))


class Separator(nn.Module):
    """The temporal convolutional network that estimates one mask per source from the features of the mixture.

    Shape: (B, num_filters, K) -> (B, num_sources, num_filters, K).
    """

    def __init__(
        self,
        *,
        num_sources: int,
        num_filters: int,
        bottleneck_channels: int,
        hidden_channels: int,
        skip_channels: int | None,
        block_kernel_size: int,
        num_blocks: int,
        num_repeats: int,
        norm: str,
        mask: str,
        causal: bool,
    ) -> None:
        super().__init__()
        self.num_sources = num_sources
        self.mask = mask
        self.input_norm = make_norm(norm, num_filters)
        self.bottleneck = PointwiseConv1d(num_filters, bottleneck_channels)
        last = num_blocks * num_repeats - 1
        self.blocks = nn.ModuleList(
            ConvBlock(
                bottleneck_channels=bottleneck_channels,
                hidden_channels=hidden_channels,
                skip_channels=skip_channels,
                kernel_size=block_kernel_size,
                dilation=2 ** (index % num_blocks),
                norm=norm,
                causal=causal,
                has_residual=skip_channels is None or index != last,
            )
            for index in range(last + 1)
        )
        self.mask_prelu = PReLU()
        self.mask_conv = PointwiseConv1d(skip_channels or bottleneck_channels, num_sources * num_filters)

    def forward(self, features: Tensor) -> Tensor:
        x = self.bottleneck(self.input_norm(features))  # (B, bottleneck, K)
        skip_sum: Tensor | None = None
        for block in self.blocks:
            x, skip_sum = block(x, skip_sum)
        return self.estimate_masks(x if skip_sum is None else skip_sum)

    def estimate_masks(self, x: Tensor) -> Tensor:
        """(B, skip or bottleneck, K) -> (B, num_sources, num_filters, K)"""
        masks = self.mask_conv(self.mask_prelu(x))  # (B, C * N, K)
        return MASKS[self.mask](masks.unflatten(1, (self.num_sources, -1)))  # (B, C, N, K)


class ConvBlock(nn.Module):
    """One block of the separator (figure 1C): widen, depthwise convolution over time, residual and skip path.

    Shape: x (B, bottleneck, K), skip_sum (B, skip, K) -> the same two with this block's branches added. None stands
    for a sum without a term. A path that the block has no branch to passes through as it came.
    """

    def __init__(
        self,
        *,
        bottleneck_channels: int,
        hidden_channels: int,
        skip_channels: int | None,
        kernel_size: int,
        dilation: int,
        norm: str,
        causal: bool,
        has_residual: bool,
    ) -> None:
        super().__init__()
        self.expand = PointwiseConv1d(bottleneck_channels, hidden_channels)
        self.expand_prelu = PReLU()
        self.expand_norm = make_norm(norm, hidden_channels)
        self.depthwise = DepthwiseConv1d(hidden_channels, kernel_size=kernel_size, dilation=dilation, causal=causal)
        self.depthwise_prelu = PReLU()
        self.depthwise_norm = make_norm(norm, hidden_channels)
        self.residual = PointwiseConv1d(hidden_channels, bottleneck_channels) if has_residual else None
        self.skip = None if skip_channels is None else PointwiseConv1d(hidden_channels, skip_channels)

    def forward(self, x: Tensor, skip_sum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden = self.expand_norm(self.expand_prelu(self.expand(x)))  # (B, hidden, K)
        hidden = self.depthwise_norm(self.depthwise_prelu(self.depthwise(hidden)))
        return self.add_branches(hidden, x, skip_sum)

    def add_branches(self, hidden: Tensor, x: Tensor, skip_sum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        residual, skip = None, None
        if self.residual is not None and self.skip is not None:
            residual, skip = two_pointwise(hidden, self.residual, self.skip)
        elif self.residual is not None:
            residual = self.residual(hidden)
        elif self.skip is not None:
            skip = self.skip(hidden)
        if skip is not None:
            skip_sum = skip if skip_sum is None else skip_sum + skip
        return (x if residual is None else x + residual), skip_sum


def _check_arguments(sizes: dict[str, int], names: dict[str, str], causal: bool) -> None:
    """Raises one ValueError with everything that is wrong, so that a user corrects all of it at once."""
    wrong = [
        f"{name} must be a whole number of at least 1, got {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if not wrong and sizes["stride"] > sizes["kernel_size"]:
        wrong.append(f"stride must not exceed kernel_size {sizes['kernel_size']}, got {sizes['stride']}")
    known = {"norm": NORMS, "mask": MASKS, "padding": PADDINGS, "encoder_activation": ENCODER_ACTIVATIONS}
    for name, value in names.items():
        if value not in known[name]:
            wrong.append(f"{name} must be one of {', '.join(sorted(known[name]))}, got {value!r}")
    if not isinstance(causal, bool):
        wrong.append(f"causal must be true or false, got {causal!r}")
    if wrong:
        raise ValueError("ConvTasNet: " + "; ".join(wrong))
